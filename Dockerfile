# `docker build -t ckpt .`, then `docker run --rm -v "$PWD:/work" -v ckpt-store:/store ckpt build recipe.toml`.
FROM python:3.13-slim

# torch for processors alone: no gigabytes of a GPU's libraries. Versions are those of constraints.txt.
COPY constraints.txt /src/
# hadolint ignore=DL3013
RUN pip install --no-cache-dir -c /src/constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu torch

COPY pyproject.toml README.md LICENSE /src/
COPY builder /src/builder
COPY ckpt_build /src/ckpt_build
COPY components_db /src/components_db
RUN pip install --no-cache-dir -c /src/constraints.txt /src \
 && useradd --create-home --uid 10001 ckpt \
 && install -d -o ckpt -g ckpt /store /work

ENV CKPT_STORE=/store CKPT_MODELS=/models
VOLUME /store
WORKDIR /work
USER 10001
ENTRYPOINT ["ckpt"]
CMD ["--help"]
