"""What every public estimator is: it links to its documentation, and tells callbacks of its fit."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, metadata

from sklearn.base import BaseEstimator

from skhead._progress import CallbackSupportMixin

__all__ = ["SkheadEstimator", "documentation_url"]

#: Environment variable with the address of the built documentation.
DOCS_VARIABLE = "SKHEAD_DOCS_URL"


class SkheadEstimator(CallbackSupportMixin, BaseEstimator):
    """Base of public estimators."""

    _doc_link_module = "skhead"

    @property
    def _doc_link_template(self) -> str:
        base = documentation_url()
        return f"{base}/api/generated/skhead.{{name}}.html" if base else ""

    def _doc_link_url_param_generator(self) -> dict[str, str]:
        return {"name": type(self).__name__}


def documentation_url() -> str:
    """Address of the documentation, without a slash at its end; empty if none is known.

    It is that of the environment variable ``SKHEAD_DOCS_URL``, or else the one that the installed
    package states for ``Documentation``.
    """
    given = os.environ.get(DOCS_VARIABLE, "")
    return (given or _stated_url()).rstrip("/")


def _stated_url() -> str:
    try:
        stated = metadata("skhead").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    urls = dict(entry.split(", ", 1) for entry in stated)
    return urls.get("Documentation", "")
