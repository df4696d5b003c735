"""The colocated run that one whose engines have GPUs of their own is compared with."""

from recipe.config import Resolved
from recipe.config.checks import problems_of
from recipe.config.flags import CommandLine
from recipe.config.loading import FLAG_SOURCE, Settings, bases_of, build_config, read_settings, trace_sources
from recipe.system.errors import UserError


def colocated_twin(settings: Settings, resolved: Resolved) -> Resolved | None:
    """What the same flags make of the nearest recipe that the run's own extends, whose engines share as many GPUs with
    the trainer. None where there is no such recipe, the flags do not suit it, or the run is colocated itself."""
    config = resolved.config
    if config.cluster.colocate or not config.needs_engine or resolved.recipe is None:
        return None
    flags = {key: setting for key, setting in settings.items() if setting.source == FLAG_SOURCE}
    for base in bases_of(resolved.recipe):
        of_base = {**read_settings(CommandLine(base, {})), **flags}
        try:
            other = build_config(of_base)
        except UserError:
            continue
        shares = other.cluster.colocate and other.paid_for == config.paid_for
        if shares and not problems_of(other, resolved.architecture):
            return Resolved(other, resolved.architecture, trace_sources(of_base), ())
    return None
