"""Derives an op's torch.library schema and its flat form from the signature of its reference.

torch.library knows tensors and scalars; an op also takes and returns NVFP4Tensors. `Signature` lays those out as their
fields and puts them together again, so that the reference's annotations stay the only definition of an op. E4M3 tensors
cross the boundary as bytes: torch has no arithmetic on them, which its own operator checks need.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamoe.contracts import E4M3Tensor
from megamoe.errors import PluginError
from megamoe.numerics.nvfp4 import NVFP4Tensor

_SCALARS = {int: "int", float: "float", bool: "bool", str: "str"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an op: `kind` is "tensor", "e4m3", "nvfp4", "either" (tensor or NVFP4) or "scalar"."""

    name: str
    kind: str
    schema: str
    optional: bool
    default: Any
    keyword_only: bool


@dataclass(frozen=True, slots=True)
class Signature:
    """An op's parameters and outputs.

    Attributes:
        parameters: In order.
        outputs: Name and kind ("tensor" or "nvfp4") of each output.
        result: NamedTuple class that holds the outputs; None for a single bare output.
        mutates: Parameters that the op writes to.
    """

    parameters: tuple[Parameter, ...]
    outputs: tuple[tuple[str, str], ...]
    result: Any
    mutates: tuple[str, ...]

    @classmethod
    def of(cls, reference: Callable[..., Any], mutates: Sequence[str] = ()) -> Signature:
        """Reads a reference's signature.

        Raises:
            PluginError: An annotation is none of those an op may have.
        """
        hints = typing.get_type_hints(reference, include_extras=True)
        where = f"{reference.__module__}.{reference.__name__}"
        returns = hints.pop("return", None)
        parameters = tuple(
            _parameter(where, p, hints.get(p.name)) for p in inspect.signature(reference).parameters.values()
        )
        for name in mutates:
            if name not in {p.name for p in parameters if p.kind in ("tensor", "e4m3")}:
                raise PluginError(f"{where}: the stage says it mutates {name!r}, which is not a tensor parameter")
        if isinstance(returns, type) and hasattr(returns, "_fields"):
            fields = typing.get_type_hints(returns)
            outputs = tuple((name, _output(where, fields[name])) for name in returns._fields)
        else:
            returns, outputs = None, (("out", _output(where, returns)),)
        if any(kind == "nvfp4" for _, kind in outputs) and "scale_layout" not in {p.name for p in parameters}:
            raise PluginError(f"{where}: returns an NVFP4Tensor but has no parameter 'scale_layout' to say its layout")
        return cls(parameters, outputs, returns, tuple(mutates))

    def schema(self) -> str:
        """The torch.library schema, without a name."""
        parts: list[str] = []
        for p in self.parameters:
            if p.keyword_only and "*" not in parts:
                parts.append("*")
            parts += self._declared(p)
        flat = ["Tensor"] * sum(3 if kind == "nvfp4" else 1 for _, kind in self.outputs)
        returns = flat[0] if len(flat) == 1 else f"({', '.join(flat)})"
        return f"({', '.join(parts)}) -> {returns}"

    def _declared(self, p: Parameter) -> list[str]:
        if p.kind == "scalar":
            return [f"{p.schema} {p.name}{_default(p)}"]
        if p.kind in ("tensor", "e4m3"):
            alias = f"(a{self.mutates.index(p.name)}!)" if p.name in self.mutates else ""
            return [f"Tensor{alias}{'?' if p.optional else ''} {p.name}{_default(p)}"]
        mark = "?" if p.kind == "either" else ""
        fields = [f"Tensor{mark} {p.name}_scales", f"Tensor{mark} {p.name}_global_scale_dec"]
        return [f"Tensor {p.name}", *fields, f"str{mark} {p.name}_scale_layout"]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, defaults filled in; written so that torch.compile can trace it.

        Raises:
            TypeError: The arguments do not fit the signature, as a plain call would say.
        """
        positional = [p.name for p in self.parameters if not p.keyword_only]
        if len(args) > len(positional):
            raise TypeError(f"takes {len(positional)} positional arguments but {len(args)} were given")
        bound = dict(zip(positional, args, strict=False))
        for name in kwargs:
            if name in bound:
                raise TypeError(f"got multiple values for argument {name!r}")
            if all(name != p.name for p in self.parameters):
                raise TypeError(f"got an unexpected keyword argument {name!r}")
        for p in self.parameters:
            if p.name in kwargs:
                bound[p.name] = kwargs[p.name]
            elif p.name not in bound:
                if p.default is ...:
                    raise TypeError(f"missing a required argument: {p.name!r}")
                bound[p.name] = p.default
        return bound

    def flatten(self, bound: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the torch.library operator."""
        flat: list[Any] = []
        keywords: dict[str, Any] = {}
        for p in self.parameters:
            value = bound[p.name]
            if p.keyword_only:
                keywords[p.name] = value
            elif p.kind in ("nvfp4", "either"):
                if isinstance(value, NVFP4Tensor):
                    flat += [value.codes, _bytes(value.scales), value.global_scale_dec, value.scale_layout]
                else:
                    flat += [value, None, None, None]
            else:
                flat.append(_bytes(value) if p.kind == "e4m3" else value)
        return flat, keywords

    def unflatten(self, flat: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `flatten`; arguments that were left out take their defaults."""
        bound: dict[str, Any] = {}
        at = 0
        for p in self.parameters:
            if p.keyword_only:
                bound[p.name] = keywords.get(p.name, p.default)
            elif p.kind in ("nvfp4", "either"):
                codes, scales, dec, layout = flat[at : at + 4]
                bound[p.name] = codes if scales is None else NVFP4Tensor(codes, _e4m3(scales), dec, layout)
                at += 4
            else:
                value = flat[at] if at < len(flat) else p.default
                bound[p.name] = _e4m3(value) if p.kind == "e4m3" else value
                at += 1
        return bound

    def flatten_result(self, result: Any) -> Tensor | tuple[Tensor, ...]:
        """What the operator returns for an op's result."""
        flat: list[Tensor] = []
        for value in (result,) if self.result is None else result:
            is_nvfp4 = isinstance(value, NVFP4Tensor)
            flat += [value.codes, value.scales.view(torch.uint8), value.global_scale_dec] if is_nvfp4 else [value]
        return flat[0] if len(flat) == 1 else tuple(flat)

    def unflatten_result(self, flat: Tensor | Sequence[Tensor], bound: Mapping[str, Any]) -> Any:
        """An op's result from what the operator returned; NVFP4 outputs have the layout of argument `scale_layout`."""
        tensors = [flat] if isinstance(flat, Tensor) else list(flat)
        values: list[Any] = []
        for _, kind in self.outputs:
            if kind == "nvfp4":
                values.append(NVFP4Tensor(tensors[0], _e4m3(tensors[1]), tensors[2], bound["scale_layout"]))
                tensors = tensors[3:]
            else:
                values.append(tensors[0])
                tensors = tensors[1:]
        return values[0] if self.result is None else self.result(*values)


def _parameter(where: str, p: inspect.Parameter, hint: Any) -> Parameter:
    if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
        raise PluginError(f"{where}: parameter {p.name!r}: an op takes plain named parameters only")
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = set(typing.get_args(hint)) if is_union else {hint}
    optional = type(None) in options
    options -= {type(None)}
    keyword_only = p.kind is p.KEYWORD_ONLY
    default = None if p.default is p.empty else p.default
    required = p.default is p.empty
    kind, schema = "", ""
    if options == {Tensor}:
        kind = "tensor"
    elif options == {E4M3Tensor}:
        kind = "e4m3"
    elif options == {NVFP4Tensor} and not optional:
        kind = "nvfp4"
    elif options == {Tensor, NVFP4Tensor} and not optional:
        kind = "either"
    elif len(options) == 1 and (name := _SCALARS.get(next(iter(options)))):
        kind, schema = "scalar", name + ("?" if optional else "")
    if not kind or (keyword_only and kind in ("nvfp4", "either")):
        raise PluginError(f"{where}: parameter {p.name!r} is annotated {hint}, which an op cannot take")
    return Parameter(p.name, kind, schema, optional, ... if required else default, keyword_only)


def _output(where: str, hint: Any) -> str:
    if hint is Tensor:
        return "tensor"
    if hint is NVFP4Tensor:
        return "nvfp4"
    raise PluginError(f"{where}: returns {hint}, expected Tensor, NVFP4Tensor or a NamedTuple of them")


def _bytes(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.view(torch.uint8)


def _e4m3(value: Tensor | None) -> Any:
    return None if value is None else value.view(torch.float8_e4m3fn)


def _default(p: Parameter) -> str:
    if p.default is ...:
        return ""
    if isinstance(p.default, str):
        return f'="{p.default}"'
    return f"={p.default}"
