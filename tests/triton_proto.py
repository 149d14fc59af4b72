"""Triton's ModelConfig for protobuf's own parser: the fields that we write, named and typed as its own."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format

_ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_UINT8", "TYPE_UINT64", "TYPE_INT32", "TYPE_FP64", "TYPE_STRING"],
    "TimeoutAction": ["REJECT", "DELAY"],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
}
_MESSAGES: dict[str, dict[str, str]] = {  # field: type, with * where it is repeated, and KEY> before a map's
    "Input": {"name": "string", "data_type": "DataType", "dims": "*int64", "optional": "bool"},
    "Output": {"name": "string", "data_type": "DataType", "dims": "*int64"},
    "QueuePolicy": {
        "timeout_action": "TimeoutAction", "default_timeout_microseconds": "uint64", "allow_timeout_override": "bool",
        "max_queue_size": "uint32",
    },
    "DynamicBatching": {"default_queue_policy": "QueuePolicy"},
    "InstanceGroup": {"kind": "Kind", "count": "int32"},
    "Parameter": {"string_value": "string"},
    "WarmUpInput": {"data_type": "DataType", "dims": "*int64", "input_data_file": "string"},
    "WarmUp": {"name": "string", "batch_size": "uint32", "inputs": ">WarmUpInput", "count": "uint32"},
    "ModelConfig": {
        "name": "string", "backend": "string", "max_batch_size": "int32", "input": "*Input", "output": "*Output",
        "dynamic_batching": "DynamicBatching", "instance_group": "*InstanceGroup", "default_model_filename": "string",
        "cc_model_filenames": ">string", "parameters": ">Parameter", "model_warmup": "*WarmUp",
    },
}  # fmt: skip


def _model_config() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="t", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), start=1):
            if kind.startswith(">"):
                entry = message.nested_type.add(name="".join(part.title() for part in field.split("_")) + "Entry")
                entry.options.map_entry = True
                _add(entry, "key", 1, "string")
                _add(entry, "value", 2, kind[1:])
                kind = f"*{name}.{entry.name}"
            _add(message, field, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


def _add(message: Any, name: str, number: int, kind: str) -> None:
    types, plain = descriptor_pb2.FieldDescriptorProto, kind.removeprefix("*")
    field = message.field.add(name=name, number=number)
    field.label = types.LABEL_REPEATED if kind.startswith("*") else types.LABEL_OPTIONAL
    if plain in _ENUMS:
        field.type, field.type_name = types.TYPE_ENUM, f".t.{plain}"
    elif plain.split(".")[0] in _MESSAGES:
        field.type, field.type_name = types.TYPE_MESSAGE, f".t.{plain}"
    else:
        field.type = getattr(types, f"TYPE_{plain.upper()}")


def parsed(text: str) -> Any:
    """A ``config.pbtxt``; a field or a value that Triton does not have is an error."""
    return text_format.Parse(text, _model_config()())


def as_dict(config: Any) -> dict[str, Any]:
    """As Triton hands it to a model of the python backend, less the fields that have their defaults."""
    found: dict[str, Any] = json_format.MessageToDict(config, preserving_proto_field_name=True)
    queue = found.get("dynamic_batching", {}).get("default_queue_policy", {})
    if "default_timeout_microseconds" in queue:  # JSON of protobuf has 64-bit numbers as text
        queue["default_timeout_microseconds"] = int(queue["default_timeout_microseconds"])
    return found
