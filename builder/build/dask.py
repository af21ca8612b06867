"""The workers of a dask cluster, as an executor that builds elsewhere."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from builder.base.errors import FetchError, Problem, UsageError
from builder.base.progress import Reporter
from builder.build.spread import Farm, Means

PATIENCE = 10.0  # seconds to find a scheduler


@contextmanager
def workers_on(address: str, means: Means, reporter: Reporter) -> Iterator[Farm]:
    """The workers of the scheduler at `dask://HOST:PORT`; that there are none yet is noted.

    Raises UsageError for another address or without the package, FetchError where nobody answers.
    """
    found = re.fullmatch(r"dask://([^/@\s]+:[0-9]+)/?", address)
    if found is None:
        hint = "such as `dask://HOST:8786`; for SLURM and the like there is `ckpt plan --snakemake`"
        raise UsageError(Problem(f"`{address}` is no address of workers", hint=hint))
    if find_spec("distributed") is None:
        hint = "`pip install 'ckpt-build[dask]'`, here and on every worker"
        raise UsageError(Problem("`--on dask://…` needs the package distributed", hint=hint))
    from distributed import Client
    from distributed.scheduler import KilledWorker

    for name in ("distributed", "distributed.client"):  # what counts is said by the build
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = Client(f"tcp://{found[1]}", timeout=PATIENCE, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "`dask scheduler` is one; the address is what it prints, with `dask` for `tcp`"
        raise FetchError(Problem(f"no scheduler answers at `{address}`", None, (said,), hint)) from None
    with client, client.get_executor(pure=False) as executor:
        if not client.scheduler_info()["workers"]:
            reporter.note(f"`{address}` has no workers yet: nothing is made until one comes")
        yield Farm(executor, means, (KilledWorker,))
