"""What can go wrong between the trainer and an engine."""

from recipe.system.errors import UserError, shortened
from recipe.system.json_text import parse_json


class EngineError(UserError):
    """An engine failed; the sentence says which and how."""


class EngineUnreachable(EngineError):
    """An engine did not answer: dead, too slow, or broken inside. The request may be sent again."""


class EngineRefused(EngineError):
    """An engine finds a request wrong; sending it again would not help."""

    def __init__(self, address: str, status: int, body: str) -> None:
        super().__init__(f"{address} refused with status {status}: {_message(body)}")
        self.status = status


class EngineAnswerError(EngineError):
    """An answer that is not in SGLang's form."""


class StaleWeights(EngineError):
    """Tokens that were made under other weights than the rollout is for."""


def first_failure(failures: ExceptionGroup) -> Exception:
    """Of tasks, the one that ended the others."""
    failure: Exception = failures
    while isinstance(failure, ExceptionGroup):
        failure = failure.exceptions[0]
    return failure


def _message(body: str) -> str:
    """The sentence in SGLang's error shapes, or the body itself."""
    try:
        answer = parse_json(body)
    except ValueError:
        return shortened(body.strip())
    match answer:
        case {"error": {"message": message}} | {"message": message}:
            return str(message)
        case _:
            return shortened(body.strip())
