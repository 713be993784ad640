"""The device that a stage computes on. torch is imported when a command runs, not for --help."""

from shared.errors import UserError, first_line


def check_device(device: str) -> None:
    """UserError unless torch can compute on `device`."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device: found {device!r}, which torch can't use ({first_line(error)}). "
            "Expected cpu, cuda, cuda:1 …"
        ) from error


def default_device() -> str:
    """A GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
