"""selftest"""


def command() -> None:
    "todo"
