"""Reads the flat camelCase names of a co-training platform's task form as the fields of a run that mean the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import yaml

_STR = "tag:yaml.org,2002:str"
_MAP = "tag:yaml.org,2002:map"
_SEQ = "tag:yaml.org,2002:seq"

FIELDS: Mapping[str, str] = {
    "taskName": "display_name",
    "studentModel": "student.model",
    "datasetId": "data.train[0].path",
    "batchSize": "optimizer.micro_batch_size",
    "gradAccumSteps": "optimizer.grad_accum_steps",
    "epochs": "optimizer.epochs",
    "learningRate": "optimizer.learning_rate",
    "optimizer": "optimizer.name",
    "lrScheduler": "optimizer.lr_scheduler",
    "weightDecay": "optimizer.weight_decay",
    "maxGradNorm": "optimizer.max_grad_norm",
    "gpuDevices": "resources.gpus",
    "checkpointInterval": "checkpoint.every_epochs",
    "loraRank": "student.lora.rank",
    "loraAlpha": "student.lora.alpha",
    "loraDropout": "student.lora.dropout",
    "targetModules": "student.lora.target_modules",
    "biasTrain": "student.lora.bias",
    "temperature": "loss.temperature",
    "hardLabelWeight": "loss.hard_weight",
    "softLabelWeight": "loss.terms[0].weight",
    "lossType": "loss.terms[0].divergence",
}
"""Field of a run by the form's name."""
_DIVERGENCES = {
    "kl_div": "forward_kl",
    "kl": "forward_kl",
    "mse": "mse",
    "reverse_kl": "reverse_kl",
    "js": "jsd",
}


def translated(root: yaml.Node) -> yaml.Node:
    """`root`, the mapping of a run file, with the form's names at its top moved to where a run has them, if it has one that is
    the form's alone.

    Nodes keep their lines, so that an error points at the form's own text. A field that a run itself has at its top, such
    as `optimizer` with fields below it, stays; so do both of two that mean the same, which the reader reports.
    """
    if not isinstance(root, yaml.MappingNode) or not any(_is_distinct(key) for key, _ in root.value):
        return root
    kept = [(key, value) for key, value in root.value if not _is_form(key, value)]
    result = yaml.MappingNode(root.tag, kept, root.start_mark, root.end_mark)
    for key, value in root.value:
        if _is_form(key, value):
            for path, moved in _moved(key.value, value):
                _place(result, path, key, moved)
    return result


def _is_distinct(key: yaml.Node) -> bool:
    """True for a name that no other trainer has: words such as alpha mean different things elsewhere."""
    return isinstance(key, yaml.ScalarNode) and key.value in FIELDS and not key.value.islower()


def _is_form(key: yaml.Node, value: yaml.Node) -> bool:
    if not isinstance(key, yaml.ScalarNode):
        return False
    if key.value == "optimizer":
        return isinstance(value, yaml.ScalarNode) and value.tag == _STR
    return key.value in FIELDS or key.value in _SPECIAL


def _moved(name: str, value: yaml.Node) -> list[tuple[str, yaml.Node]]:
    if name in _SPECIAL:
        return _SPECIAL[name](value)
    if name == "lossType" and isinstance(value, yaml.ScalarNode):
        value = _scalar(value, _DIVERGENCES.get(str(value.value), str(value.value)))
    return [(FIELDS[name], value)]


def _alpha(value: yaml.Node) -> list[tuple[str, yaml.Node]]:
    """The share of the soft labels; the hard ones have the rest."""
    try:
        share = float(value.value) if isinstance(value, yaml.ScalarNode) else -1.0
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        return [("alpha", value)]  # no field of a run: the reader refuses it, with its line
    hard = yaml.ScalarNode("tag:yaml.org,2002:float", repr(1 - share), value.start_mark, value.end_mark)
    return [("loss.terms[0].weight", value), ("loss.hard_weight", hard)]


def _layers(value: yaml.Node) -> list[tuple[str, yaml.Node]]:
    """Layers to adapt; "all" is what a run takes without them."""
    is_all = isinstance(value, yaml.ScalarNode) and value.value == "all"
    return [] if is_all else [("student.lora.layers", value)]


def _save(value: yaml.Node) -> list[tuple[str, yaml.Node]]:
    """Checkpoints: a run always writes some."""
    is_true = isinstance(value, yaml.ScalarNode) and value.value.lower() in ("true", "yes", "on")
    return [] if is_true else [("autoSaveCheckpoint", value)]


_SPECIAL: Mapping[str, Callable[[yaml.Node], list[tuple[str, yaml.Node]]]] = {
    "alpha": _alpha,
    "layers": _layers,
    "autoSaveCheckpoint": _save,
}


def _place(root: yaml.MappingNode, path: str, key: yaml.Node, value: yaml.Node) -> None:
    """Puts `value` at `path` below `root`, and makes the mappings and the list between."""
    node: yaml.MappingNode = root
    *sections, name = path.split(".")
    for section in sections:
        plain, is_item = section.removesuffix("[0]"), section.endswith("[0]")
        child = next((each for own, each in node.value if own.value == plain), None)
        if child is None:
            child = yaml.MappingNode(_MAP, [], key.start_mark, key.end_mark)
            above = yaml.SequenceNode(_SEQ, [child], key.start_mark, key.end_mark) if is_item else child
            node.value.append((_scalar(key, plain), above))
        elif is_item and isinstance(child, yaml.SequenceNode) and child.value:
            child = child.value[0]
        if not isinstance(child, yaml.MappingNode):
            node = root  # not where a run has it: the reader refuses the name as it stands
            name = str(getattr(key, "value", name))
            break
        node = child
    node.value.append((_scalar(key, name), value))


def _scalar(node: yaml.Node, text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode(_STR, text, node.start_mark, node.end_mark)
