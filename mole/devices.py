"""Where things are computed."""

import torch

from mole.errors import MoleError


def usable_device(device: str | torch.device) -> torch.device:
    """A device on which a tensor can be made.

    Raises:
        MoleError: there is no such device here.
    """
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise RuntimeError("nothing is computed there")
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, TypeError):
        raise MoleError(f"device {device!r} is not here; legal is cpu, or cuda where PyTorch finds it") from None
    return place
