"""The colocated run that one whose engines have GPUs of their own is compared with."""

from recipe.config import Resolved
from recipe.config.checks import problems_of
from recipe.config.flags import CommandLine
from recipe.config.loading import FLAG_SOURCE, Settings, bases_of, build_config, read_settings, trace_sources
from recipe.system.errors import UserError


def colocated_twin(settings: Settings, resolved: Resolved) -> Resolved | None:
    """The nearest recipe that the run's own extends whose engines share as many GPUs with the trainer, under the same
    flags, but for those of settings in which the two recipes differ. None where there is no such recipe, the flags do
    not suit it, or the run is colocated itself."""
    config = resolved.config
    if config.cluster.colocate or not config.needs_engine or resolved.recipe is None:
        return None
    own = read_settings(CommandLine(resolved.recipe, {}))
    flags = {key: setting for key, setting in settings.items() if setting.source == FLAG_SOURCE}
    for base in bases_of(resolved.recipe):
        of_base = read_settings(CommandLine(base, {}))
        shared = {key: setting for key, setting in flags.items() if _value(own, key) == _value(of_base, key)}
        twin = {**of_base, **shared}
        try:
            other = build_config(twin)
        except UserError:
            continue
        as_many = other.cluster.colocate and other.paid_for == config.paid_for
        if as_many and not problems_of(other, resolved.architecture):
            return Resolved(other, resolved.architecture, trace_sources(twin), ())
    return None


def _value(settings: Settings, key: str) -> object:
    setting = settings.get(key)
    return None if setting is None else setting.value
