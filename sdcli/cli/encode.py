"""encode"""


def command() -> None:
    "todo"
