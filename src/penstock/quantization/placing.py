"""Which format each matrix of a model has, and where one that is joined of several must be cut.

Owns the rule that memory plans and leaves share. Imports neither torch nor the native library.
Invariant: what is cut here has the bytes that `schemes` counts for each piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from penstock.quantization.schemes import Format, Scheme, coded
from penstock.quantization.stored import StoredPrecision


class Piece(NamedTuple):
    """Some of a matrix's parts, one after the other, in one format."""

    first_part: int
    num_parts: int
    num_rows: int
    form: Format


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of one model's matrices: those of a quantized checkpoint, else the scheme's."""

    scheme: Scheme
    stored: StoredPrecision | None = None

    @property
    def activation_bits(self) -> int:
        """What quantized matrices multiply: 8 or 16 bits."""
        return self.scheme.activation_bits if self.stored is None else self.stored.activation_bits

    def table(self, name: str, num_rows: int, num_columns: int) -> Format:
        """Of an embedding or a head; `name` is the weight's."""
        return self._of(name, num_rows, num_columns, self.scheme.table)

    def linear(
        self, parts: Sequence[tuple[str, int]], num_columns: int, *, is_gated: bool
    ) -> list[Piece]:
        """Of a matrix that is joined of parts, each with the name of its weight and its rows.

        Gate and up lie in turns and so have one format: if the checkpoint's differ, that of a
        matrix which is not quantized.
        """
        forms = [
            self._of(name, num_rows, num_columns, self.scheme.linear) for name, num_rows in parts
        ]
        if is_gated and len(set(forms)) > 1:
            forms = [self.scheme.linear] * len(forms)
        pieces: list[Piece] = []
        for index, ((_, num_rows), form) in enumerate(zip(parts, forms, strict=True)):
            if pieces and pieces[-1].form == form:
                last = pieces.pop()
                pieces.append(
                    last._replace(num_parts=last.num_parts + 1, num_rows=last.num_rows + num_rows)
                )
            else:
                pieces.append(Piece(index, 1, num_rows, form))
        return pieces

    def _of(self, name: str, num_rows: int, num_columns: int, plain: Format) -> Format:
        if self.stored is None:
            return plain
        form = self.stored.form(name, (num_rows, num_columns))
        return plain if form is None else coded(form, self.stored.activation_bits)
