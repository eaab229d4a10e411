"""What sparse autoencoders miss in language-model activations.

Names are loaded when first used, so that `import darkmatter` costs no heavy library.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from darkmatter._refusal import Refusal
    from darkmatter.activations import Batch, Tokens, collect, stream
    from darkmatter.autoencoders import (
        LinearlyCorrected,
        PursuitEncoder,
        adapt,
        load_autoencoder,
        open_autoencoders,
        reconstruct,
        sparse_decode,
        sparse_encode,
    )
    from darkmatter.documents import (
        read_dataset,
        read_documents,
        read_tokens,
        save_tokens,
        tokenise,
    )
    from darkmatter.errors import ErrorParts, scalar_share, split_error
    from darkmatter.geometry import neighbour_cosines
    from darkmatter.intervals import Interval, bootstrap, document_sums
    from darkmatter.latents import LatentPage, latent_page, latent_pages, write_latents
    from darkmatter.leastsquares import (
        LinearMap,
        LinearStatistics,
        RidgeUsedWarning,
        fvu,
        r2,
    )
    from darkmatter.models import Model, open_model
    from darkmatter.pursuit import gradient_pursuit, matching_pursuit, nonnegative_refit
    from darkmatter.report import write_report
    from darkmatter.scaling import (
        NormMoments,
        PerTokenScaling,
        PowerLaw,
        fit_power_law,
        per_token_scaling,
    )
    from darkmatter.sparse import SparseCode
    from darkmatter.splicing import Splice, splice
    from darkmatter.suites import Suite, list_suites, load_suite
    from darkmatter.survey import Survey, merge, survey

_HOMES = {
    "_refusal": ("Refusal",),
    "activations": ("Batch", "Tokens", "collect", "stream"),
    "autoencoders": (
        "LinearlyCorrected",
        "PursuitEncoder",
        "adapt",
        "load_autoencoder",
        "open_autoencoders",
        "reconstruct",
        "sparse_decode",
        "sparse_encode",
    ),
    "documents": ("read_dataset", "read_documents", "read_tokens", "save_tokens", "tokenise"),
    "errors": ("ErrorParts", "scalar_share", "split_error"),
    "geometry": ("neighbour_cosines",),
    "intervals": ("Interval", "bootstrap", "document_sums"),
    "latents": ("LatentPage", "latent_page", "latent_pages", "write_latents"),
    "leastsquares": ("LinearMap", "LinearStatistics", "RidgeUsedWarning", "fvu", "r2"),
    "models": ("Model", "open_model"),
    "pursuit": ("gradient_pursuit", "matching_pursuit", "nonnegative_refit"),
    "report": ("write_report",),
    "scaling": (
        "NormMoments",
        "PerTokenScaling",
        "PowerLaw",
        "fit_power_law",
        "per_token_scaling",
    ),
    "sparse": ("SparseCode",),
    "splicing": ("Splice", "splice"),
    "suites": ("Suite", "list_suites", "load_suite"),
    "survey": ("Survey", "merge", "survey"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "ErrorParts",
    "Interval",
    "LatentPage",
    "LinearMap",
    "LinearStatistics",
    "LinearlyCorrected",
    "Model",
    "NormMoments",
    "PerTokenScaling",
    "PowerLaw",
    "PursuitEncoder",
    "Refusal",
    "RidgeUsedWarning",
    "SparseCode",
    "Splice",
    "Suite",
    "Survey",
    "Tokens",
    "adapt",
    "bootstrap",
    "collect",
    "document_sums",
    "fit_power_law",
    "fvu",
    "gradient_pursuit",
    "latent_page",
    "latent_pages",
    "list_suites",
    "load_autoencoder",
    "load_suite",
    "matching_pursuit",
    "merge",
    "neighbour_cosines",
    "nonnegative_refit",
    "open_autoencoders",
    "open_model",
    "per_token_scaling",
    "r2",
    "read_dataset",
    "read_documents",
    "read_tokens",
    "reconstruct",
    "save_tokens",
    "scalar_share",
    "sparse_decode",
    "sparse_encode",
    "splice",
    "split_error",
    "stream",
    "survey",
    "tokenise",
    "write_latents",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'darkmatter' has no attribute {name!r}")
    value = getattr(import_module(f"darkmatter.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`survey` is a module and a function: importing the module must not bind its name here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
