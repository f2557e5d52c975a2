"""What the values of a configuration must be."""


def broken(config, rules: list[tuple[str, str, bool]]) -> list[str]:
    """A sentence for each rule (name of the value, what it must be, whether it is) that `config` breaks."""
    return [f"{name} must be {rule}, got {getattr(config, name)!r}" for name, rule, holds in rules if not holds]


def check(config, rules: list[tuple[str, str, bool]]) -> None:
    """Raise ValueError with all the rules that `config` breaks, if any."""
    if problems := broken(config, rules):
        raise ValueError(f"{type(config).__name__}: {'; '.join(problems)}")
