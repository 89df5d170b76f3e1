"""A model without weights, whose layers are filled one at a time: transformers' own classes on the meta device.

How each layer is called (masks, rotary positions, whatever an architecture hands on) is not written down here but
recorded: the model's own forward runs with a stand-in for every layer, once for a batch. The same way the stream
behind the last layer goes through the model's own norm and head. A model that does anything else with the stream
between two layers is found out, and can't be streamed. Does not know batches, prefixes or directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from abliterate.contract.errors import ModelError
from abliterated.pipeline.source import Source
from abliterated.pipeline.taps import NO_TEXT, layer_list, stream_of
from abliterated.pipeline.weights import Tensors, Unstreamable, Weights

# A layer may give out more than the stream: attention weights, a cache.
MOST_OUTPUTS: Final = 3


@dataclass(frozen=True)
class Call:
    """What the model hands to a layer beside the stream."""

    args: tuple[Any, ...]
    options: dict[str, Any]


class Skeleton:
    """The empty model and where its weights come from."""

    def __init__(self, source: Source, model: Any, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.source, self.model, self.weights = source, model, weights
        self.device, self.dtype = device, dtype
        self.layers_name, self._list = layer_list(model)
        self.layers = list(self._list)
        self.head = model.get_output_embeddings()
        self._mapping = get_model_conversion_mapping(model, None, None)
        self._table = _name_of(model, model.get_input_embeddings()) + ".weight"
        self._head_names = [f"{_name_of(model, self.head)}.{name}" for name, _ in self.head.named_parameters()]
        self._outputs: int | None = None  # how many things a layer gives out; 0: the stream alone, in no tuple
        self._buffers_moved()

    def fill(self, number: int) -> None:
        """Read one layer's weights. ModelError where one is missing."""
        self._take(self.weights.layer(number))
        layer = self.layers[number]
        missing = [name for name, value in layer.named_parameters() if value.is_meta]
        if missing:
            raise self._lacking(f"{self.layers_name}.{number}.{missing[0]}")
        layer.to(self.device)

    def empty(self, number: int) -> None:
        """Let one layer's weights go."""
        _emptied(self.layers[number])

    def fill_outside(self, tokens: Sequence[int]) -> None:
        """Everything outside the layers but the head; of the embedding, the rows of these tokens alone."""
        wanted = [name for name, value in self._outside() if value.is_meta and name not in self._head_names]
        there = self.weights.names()
        for name in wanted:
            if name == self._table:
                continue
            if name not in there:
                raise self._lacking(name)
            self._take(self.weights.outside(name))
        rows = sorted(set(tokens) | {0})
        table = self.model.get_input_embeddings()
        if table.weight.is_meta:
            # As large as ever, but only the rows written to take up memory; no other is read.
            empty = torch.empty(table.weight.shape, dtype=self.dtype, device=self.device)
            table.weight = torch.nn.Parameter(empty, requires_grad=False)
        table.weight[rows] = self.weights.rows(self._table, rows).to(self.device, self.dtype)

    def fill_head(self) -> None:
        """The head, or the embedding in its place where they are one."""
        there = self.weights.names()
        for name in self._head_names:
            if name in there:
                self._take(self.weights.outside(name))
            elif name.endswith(".weight"):
                tied = next(iter(self.weights.outside(self._table).values()))
                self.head.weight = torch.nn.Parameter(tied.to(self.device, self.dtype), requires_grad=False)
            else:
                raise self._lacking(name)
        self.head.to(self.device)

    def empty_head(self) -> None:
        """Let the head's weights go."""
        if self.head is not self.model.get_input_embeddings():
            _emptied(self.head)

    def tried(self) -> None:
        """Find out now whether the layers stand alone, by what they are called with and by the first of them.

        Unstreamable, or whatever the layer raises, where they don't.
        """
        with torch.inference_mode():
            self.fill_outside([])
            ids = torch.zeros((1, 3), dtype=torch.long, device=self.device)
            stream, calls = self.unroll(ids, len(self.layers), use_cache=False)
            try:
                self.fill(0)
                found = stream_of(self.layers[0](stream, *calls[0].args, **calls[0].options))
            finally:
                self.empty(0)
            if found.shape != stream.shape:
                raise Unstreamable("a layer gives out something else than the stream")

    def unroll(self, ids: torch.Tensor, depth: int, **options: Any) -> tuple[torch.Tensor, list[Call]]:
        """The stream (rows, tokens, hidden) that enters the first layer, and how the first `depth` are called."""
        for outputs in range(MOST_OUTPUTS + 1) if self._outputs is None else (self._outputs,):
            # Through the last layer even if fewer are asked for: only then is it known that they hand on the stream.
            record = _Record(depth if self._outputs is not None else len(self.layers), outputs)
            try:
                self._through(record.stand_in, ids, options)
            except _Enough:
                self._outputs = outputs
                assert record.stream is not None
                return record.stream, record.calls[:depth]
            except (_Changed, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
                if self._outputs is not None:
                    raise Unstreamable("the model's layers are not called alike every time") from error
        raise Unstreamable("the model changes the stream between two layers")

    def finish(self, stream: torch.Tensor) -> torch.Tensor:
        """The logits (rows, vocabulary) of streams (rows, hidden) that left the last layer."""
        last = len(self.layers) - 1

        def stand_in(number: int, given: Any, _: tuple[Any, ...], __: dict[str, Any]) -> Any:
            found = stream[:, None, :] if number == last else given
            return _as_output(found, self._outputs or 0)

        ids = torch.zeros((len(stream), 1), dtype=torch.long, device=self.device)
        logits: torch.Tensor = self._through(stand_in, ids, {"use_cache": False}).logits
        return logits[:, -1]

    def _through(self, stand_in: Callable[..., Any], ids: torch.Tensor, options: dict[str, Any]) -> Any:
        """The model's forward with `stand_in` for its layers."""
        try:
            for number, layer in enumerate(self.layers):
                self._list[number] = _StandIn(number, layer, stand_in)
            return self.model(input_ids=ids, **options)
        finally:
            for number, layer in enumerate(self.layers):
                self._list[number] = layer

    def _take(self, tensors: Tensors) -> None:
        """Into the model, through transformers' own renaming, merging and casting."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        settings = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self._mapping,
        )
        with torch.no_grad():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), settings)
        wrong = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.mismatched_keys]
        if wrong or info.conversion_errors or info.error_msgs:
            name = next(iter([*wrong, *info.conversion_errors, *info.error_msgs]))
            raise ModelError(f"{self.source.name} holds {name} in an unexpected shape", remedy="Download it again")

    def _outside(self) -> list[tuple[str, torch.Tensor]]:
        inside = self.layers_name + "."
        return [
            (name, value)
            for name, value in self.model.named_parameters()
            if not name.startswith(inside) and not any(part in name for part in NO_TEXT)
        ]

    def _buffers_moved(self) -> None:
        for module in self.model.modules():
            for name, value in module._buffers.items():
                if value is not None and not value.is_meta:
                    module._buffers[name] = value.to(self.device)

    def _lacking(self, name: str) -> ModelError:
        return ModelError(f"{self.source.name} lacks {name}", remedy="Download it again, completely")


class _Enough(Exception):
    """Every layer's call is recorded."""


class _Changed(Exception):
    """A layer was given something else than what its neighbour gave out."""


class _Record:
    """Notes how layers are called, passing the stream on unchanged."""

    def __init__(self, depth: int, outputs: int) -> None:
        self.depth, self.outputs = depth, outputs
        self.stream: torch.Tensor | None = None
        self.calls: list[Call] = []
        self._given: Any = None

    def stand_in(self, number: int, stream: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if number != len(self.calls) or not isinstance(stream, torch.Tensor) or stream.dim() != 3:
            raise _Changed
        if number == 0:
            self.stream = stream
        elif stream is not self._given:
            raise _Changed
        self.calls.append(Call(args, options))
        if len(self.calls) == self.depth:
            raise _Enough
        # A new object, by which it is known again, of the same numbers.
        self._given = stream.view_as(stream)
        return _as_output(self._given, self.outputs)


def _as_output(stream: Any, outputs: int) -> Any:
    return (stream, *[None] * (outputs - 1)) if outputs else stream


class _StandIn(torch.nn.Module):
    """Stands in a layer's place, and is asked for whatever else the layer is asked for."""

    def __init__(self, number: int, layer: torch.nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(_number=number, _layer=layer, _answer=answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **options: Any) -> Any:
        rest = dict(options)
        stream = args[0] if args else rest.pop("hidden_states", None)
        return self.__dict__["_answer"](self.__dict__["_number"], stream, args[1:], rest)


def _emptied(module: torch.nn.Module) -> None:
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and not value.is_meta:
                part._parameters[name] = torch.nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)


def _name_of(model: Any, wanted: Any) -> str:
    for name, module in model.named_modules():
        if module is wanted:
            return str(name)
    raise Unstreamable("the model's embedding or head is not to be found")


def class_for(config: Any) -> Any:
    """The class transformers loads such a model with. What sees or hears is asked in words like any other."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for one in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in one._model_mapping:
            return one
    return AutoModelForCausalLM  # which says what is wrong


def build(source: Source, folder: Any, file: str, device: torch.device, dtype: torch.dtype) -> Skeleton:
    """The empty model for these files. Unstreamable where it can't be had."""
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from abliterated.pipeline.gguf_corrections import correct, correct_config
    from abliterated.pipeline.gguf_file import read_gguf

    more = {"gguf_file": file} if file else {}
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **more)
    if file:
        config = correct_config(read_gguf(source.path), config)
    with init_empty_weights(include_buffers=False):
        model = class_for(config).from_config(config, dtype=dtype, trust_remote_code=False)
    model.requires_grad_(False)
    model.eval()
    if model.get_output_embeddings() is None or model.get_input_embeddings() is None:
        raise Unstreamable("the model has no head of its own")
    if not file and (source.path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    skeleton = Skeleton(source, model, _weights(source, model, config, bool(file)), device, dtype)
    if file:
        correct(read_gguf(source.path), model)
        skeleton._buffers_moved()
    return skeleton


def _weights(source: Source, model: Any, config: Any, is_gguf: bool) -> Weights:
    from abliterated.pipeline.weights import FolderWeights, GgufWeights

    layers, _ = layer_list(model)
    if not is_gguf:
        from abliterated.pipeline.safetensors_file import read_shards

        keys = [stored.name for shard in read_shards(source.path) for stored in shard.tensors]
        return FolderWeights(source.path, layers, _renamed(model, keys))
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    if is_gguf_arch_supported(source.architecture):
        raise Unstreamable(f"transformers reads a GGUF of {source.architecture} in another way")
    processor = TENSOR_PROCESSORS.get(source.architecture, TensorProcessor)(config=config.to_dict())
    return GgufWeights(source, processor, get_gguf_hf_weights_map(model, processor))


def _renamed(model: Any, keys: Sequence[str]) -> dict[str, str]:
    """Each checkpoint's name as the model has it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model, None, None)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names = model.state_dict()
    found = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:
            name = key
        found[key] = name
    return found
