"""Mixtures of experts that the native library computes: a router, then one op for all experts.

Owns how the experts' maps lie in two packed matrices, and the router's. Which tokens take which
experts is decided within the op.

Invariant: the router computes in float32, because it decides between scores that are close.
"""

from __future__ import annotations

from collections.abc import Iterator

from penstock.layers.native_linear import activation_id, product_args
from penstock.layers.native_materials import (
    Matrix,
    NativeMaterials,
    matrix_weight,
    vector_weight,
)
from penstock.layers.specs import ExpertsSpec
from penstock.layers.toolkit import ExpertNames, Weight
from penstock.native.program import Buffer
from penstock.native.structs import ExpertsArgs, OpKind, Scoring
from penstock.native.weights import PANEL_ROWS, Placement, padded_rows
from penstock.quantization.schemes import Format

_ROUTER = Format("float32")


class Router:
    """Scores of all experts."""

    def __init__(
        self, name: str, num_experts: int, in_size: int, *, bias: bool, materials: NativeMaterials
    ) -> None:
        self.name = name
        self._materials = materials
        self._weight = materials.matrix(_ROUTER, num_experts, in_size)
        self._bias = materials.vector(padded_rows(num_experts)) if bias else None

    def weights(self) -> Iterator[Weight]:
        """The map, [num_experts, in], and perhaps a bias."""
        num_rows = self._weight.num_rows
        yield matrix_weight(f"{self.name}.weight", self._weight, num_rows)
        if self._bias is not None:
            yield vector_weight(f"{self.name}.bias", self._bias.values, num_rows)

    def __call__(self, x: Buffer) -> Buffer:
        """Logits [T, num_experts], float32, of x [T, in]."""
        program = self._materials.program
        logits = program.value(self._weight.num_rows, "float32")
        args = product_args(self._materials, self._weight, x, logits, logits.width)
        if self._bias is not None:
            args.bias = self._bias.values.ctypes.data
        program.append(OpKind.LINEAR, args, x=x, y=logits)
        return logits


class Experts:
    """Gated MLPs of which each token takes the best `top_k`."""

    def __init__(
        self, in_size: int, spec: ExpertsSpec, names: ExpertNames, materials: NativeMaterials
    ) -> None:
        count, size = spec.num_experts, spec.size
        self._spec = spec
        self._names = names
        self._in_size = in_size
        self._materials = materials
        self._router = Router(
            names.router, count, in_size, bias=spec.has_router_bias, materials=materials
        )
        self._correction = materials.vector(count) if spec.has_correction else None
        # Of one expert in both: rows with what fills up their last panels.
        self._gate_up_rows, self._down_rows = 2 * padded_rows(size), padded_rows(in_size)
        self._gate_up = materials.matrix(
            self._form([names.gate, names.up], size, in_size), count * self._gate_up_rows, in_size
        )
        self._down = materials.matrix(
            self._form([names.down], in_size, size), count * self._down_rows, size
        )
        self._gate_up_bias = materials.vector(self._gate_up.num_rows) if spec.has_bias else None
        self._down_bias = materials.vector(self._down.num_rows) if spec.has_bias else None

    def _form(self, names: list[str], num_rows: int, num_columns: int) -> Format:
        """That of all experts' maps; if they differ, that of a matrix which has no codes."""
        formats = self._materials.formats
        forms = {
            formats.linear(
                [(f"{name.format(number)}.weight", num_rows) for name in names],
                num_columns,
                is_gated=len(names) > 1,
            )[0].form
            for number in range(self._spec.num_experts)
        }
        return forms.pop() if len(forms) == 1 else formats.scheme.linear

    def weights(self) -> Iterator[Weight]:
        """Those of the router and of every expert."""
        names, size = self._names, self._spec.size
        yield from self._router.weights()
        if self._correction is not None:
            yield vector_weight(names.correction, self._correction.values, self._spec.num_experts)
        for number in range(self._spec.num_experts):
            first = number * self._gate_up_rows
            gate, up = Placement(first, 2), Placement(first + PANEL_ROWS, 2)
            down = Placement(number * self._down_rows)
            yield from self._expert(names.gate.format(number), self._gate_up, size, gate)
            yield from self._expert(names.up.format(number), self._gate_up, size, up)
            yield from self._expert(names.down.format(number), self._down, self._in_size, down)

    def _expert(
        self, name: str, matrix: Matrix, num_rows: int, placement: Placement
    ) -> Iterator[Weight]:
        yield matrix_weight(f"{name}.weight", matrix, num_rows, placement)
        bias = self._gate_up_bias if matrix is self._gate_up else self._down_bias
        if bias is not None:
            yield vector_weight(f"{name}.bias", bias.values, num_rows, placement)

    def finish(self) -> None:
        """Nothing to derive."""

    def __call__(self, x: Buffer, shared: Buffer | None, shared_gate: Buffer | None) -> Buffer:
        """[T, size] of x [T, size]; `shared`, times the sigmoid of its gate [T, 1], is added."""
        logits = self._router(x)
        y = self._materials.program.value(self._in_size, x.dtype)
        args = self._args(x, logits, y)
        values = {"x": x, "logits": logits, "y": y}
        if shared is not None:
            assert shared.dtype == x.dtype, "an MLP beside experts that read the stream itself"
            args.shared_stride = shared.width
            values["shared"] = shared
        if shared_gate is not None:
            assert shared is not None
            args.shared_gate_stride = shared_gate.width
            values["shared_gate"] = shared_gate
        self._materials.program.append(OpKind.EXPERTS, args, **values)
        return y

    def _args(self, x: Buffer, logits: Buffer, y: Buffer) -> ExpertsArgs:
        spec = self._spec
        args = ExpertsArgs(
            gate_up=self._gate_up.packed.struct,
            down=self._down.packed.struct,
            x_stride=x.width,
            logits_stride=logits.width,
            y_stride=y.width,
            num_experts=spec.num_experts,
            in_size=self._in_size,
            size=spec.size,
            top_k=spec.top_k,
            num_expert_groups=spec.num_groups,
            top_groups=spec.top_groups,
            group_top=spec.group_top,
            scoring=Scoring[spec.scoring.upper()],
            normalise=spec.is_normalised,
            activation=activation_id(spec.activation),
            activation_bits=self._materials.bits_beside(self._gate_up.form, self._down.form),
            dtype=x.dtype_id,
            routed_scale=spec.scale,
        )
        for field, vector in (
            ("gate_up_bias", self._gate_up_bias),
            ("down_bias", self._down_bias),
            ("correction", self._correction),
        ):
            if vector is not None:
                setattr(args, field, vector.values.ctypes.data)
        return args
