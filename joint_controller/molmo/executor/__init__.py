"""The executor of this family: a frozen Molmo that answers questions at a knob setting."""

from .molmo_executor import MolmoExecutor


__all__ = ["MolmoExecutor"]
