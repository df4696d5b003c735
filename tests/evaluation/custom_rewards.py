"""Custom rewards, for processes that call them by name."""


def by_label(prompt: str, response: str, label: str) -> float:
    return -2.0 if label == "3" else 4.0


def always(prompt: str, response: str, label: str) -> float:
    return 2.5
