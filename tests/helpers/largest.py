"""The largest errors that a session's tests have seen, by operation; pytest says them at its end (without -n, or with -n 0)."""

_seen: dict[str, tuple[int, dict[str, float]]] = {}


def note(operation: str, **errors: float) -> None:
    """One more case of an operation, and its errors by name."""
    cases, largest = _seen.get(operation, (0, {}))
    _seen[operation] = cases + 1, largest | {name: max(error, largest.get(name, 0.0)) for name, error in errors.items()}


def lines() -> list[str]:
    return [
        f"{operation}: {cases} cases, largest errors {', '.join(f'{name} {error:.1e}' for name, error in largest.items())}"
        for operation, (cases, largest) in sorted(_seen.items())
    ]
