"""What an edit did, tensor by tensor: shared by the GGUF and the safetensors editor. Pure data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorEdit:
    """One edited tensor.

    `type` is the one written; `promoted_from` the one it had where that could not hold the edit ("" where kept).
    `residual` is ‖vᵀW'‖/‖vᵀW‖ of the bytes written; at strength 1 it should be nil. Where norms stand behind the
    writer, v is the direction as the stream sees it through them; `uncorrected`: the edit did not heed those norms
    (`edit.post_norm = false`), so that this share of the direction still comes through.
    `rounding` is ‖vᵀ(W' written − W' exact)‖/‖vᵀW‖: what rounding alone left, whatever the strength.
    """

    name: str
    type: str
    kind: str
    layer: int
    residual: float
    rounding: float = 0.0
    promoted_from: str = ""
    uncorrected: bool = False


@dataclass(frozen=True)
class EditReport:
    """All edited tensors. `expected`: how many should have been, unknown ones included; `content`: sha256 (hex) of
    the edited tensors' names and bytes, in file order; `unknown`: what `allow_partial` let pass."""

    tensors: tuple[TensorEdit, ...]
    expected: int
    bytes_written: int
    content: str = ""
    unknown: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Writers edited / writers expected."""
        return len(self.tensors) / self.expected if self.expected else 0.0

    @property
    def residual(self) -> float:
        """The largest ‖vᵀW'‖/‖vᵀW‖."""
        return max((tensor.residual for tensor in self.tensors), default=0.0)

    @property
    def let_through(self) -> float:
        """The largest share that norms the edit did not heed let through."""
        return max((tensor.residual for tensor in self.tensors if tensor.uncorrected), default=0.0)

    @property
    def rounding(self) -> float:
        """The largest share that rounding alone left."""
        return max((tensor.rounding for tensor in self.tensors), default=0.0)

    @property
    def promoted(self) -> tuple[str, ...]:
        """The tensors whose type had to change."""
        return tuple(tensor.name for tensor in self.tensors if tensor.promoted_from)
