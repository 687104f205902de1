"""decode"""


def command() -> None:
    "todo"
