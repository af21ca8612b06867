"""Which view answers which address: what is asked for has no effect, what is sent may have one."""

from __future__ import annotations

from collections.abc import Callable

from builder.web.site import Form, Json, Site, View
from builder.web.views import (
    diff,
    extract,
    inbox,
    jobs,
    library,
    merge,
    prune,
    recipe,
    replace,
    report,
    store,
)

PAGES: dict[str, View] = {
    "": library.show,
    "report": report.show,
    "prune": prune.show,
    "replace": replace.show,
    "extract": extract.show,
    "merge": merge.show,
    "diff": diff.show,
    "recipe": recipe.show,
    "inbox": inbox.show,
    "store": store.show,
    "jobs": jobs.show_all,
    "job": jobs.show,
}

POSTS: dict[str, View] = {
    "read": library.read,
    "report": report.read,
    "prune": prune.run,
    "replace": replace.run,
    "extract": extract.run,
    "merge": merge.run,
    "diff": diff.run,
    "check": recipe.check,
    "save": recipe.save,
    "build": recipe.build,
    "inbox": inbox.run,
    "gc": store.collect,
    "store-check": store.check,
    "cancel": jobs.cancel,
}

API: dict[str, Callable[[Site, Form], Json]] = {
    "library": library.data,
    "inspect": report.data,
    "prune": prune.data,
    "plan": recipe.data,
    "store": store.data,
    "job": jobs.data,
}
