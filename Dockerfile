# `docker build -t ckpt .`, then `docker run --rm -v "$PWD:/work" -v ckpt-store:/store ckpt build recipe.toml`.
# Debian's torch computes on processors alone: no gigabytes of a GPU's libraries, and the same bytes.
FROM debian:trixie-slim

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3-torch python3-venv \
 && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /src/
COPY builder /src/builder
COPY ckpt_build /src/ckpt_build
COPY components_db /src/components_db
RUN python3 -m venv --system-site-packages /opt/ckpt \
 && /opt/ckpt/bin/pip install --no-cache-dir /src \
 && useradd --create-home --uid 10001 ckpt \
 && install -d -o ckpt -g ckpt /store /work

ENV PATH=/opt/ckpt/bin:$PATH CKPT_STORE=/store CKPT_MODELS=/models
VOLUME /store
WORKDIR /work
USER 10001
ENTRYPOINT ["ckpt"]
CMD ["--help"]
