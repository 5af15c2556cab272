"""Names a user may have meant: close spellings, the same leaf in another group, other trainers' names for a field."""

import difflib
from collections.abc import Iterable

# Another trainer's name, without '_' and in small letters -> ours.
_ALIASES = {
    "lr": ("optimizer.learning_rate",),
    "peaklr": ("optimizer.learning_rate",),
    "maxlr": ("optimizer.learning_rate",),
    "wd": ("optimizer.weight_decay",),
    "beta1": ("optimizer.b1",),
    "adambeta1": ("optimizer.b1",),
    "beta2": ("optimizer.b2",),
    "adambeta2": ("optimizer.b2",),
    "betas": ("optimizer.b1", "optimizer.b2"),
    "adamepsilon": ("optimizer.eps",),
    "epsilon": ("optimizer.eps",),
    "warmup": ("optimizer.warmup_ratio", "optimizer.warmup_steps"),
    "warmupsteps": ("optimizer.warmup_steps",),
    "scheduler": ("optimizer.schedule",),
    "lrscheduler": ("optimizer.schedule",),
    "lrschedulertype": ("optimizer.schedule",),
    "clip": ("optimizer.clip_norm",),
    "gradclip": ("optimizer.clip_norm",),
    "gradientclipping": ("optimizer.clip_norm",),
    "maxgradnorm": ("optimizer.clip_norm",),
    "bs": ("train.global_batch",),
    "batch": ("train.global_batch",),
    "batchsize": ("train.global_batch",),
    "globalbatchsize": ("train.global_batch",),
    "trainbatchsize": ("train.global_batch",),
    "perdevicetrainbatchsize": ("data.rows_per_device", "train.global_batch"),
    "microbatch": ("data.rows_per_device",),
    "microbatchsize": ("data.rows_per_device",),
    "gradientaccumulationsteps": ("train.global_batch",),
    "gradaccum": ("train.global_batch",),
    "epoch": ("train.epochs",),
    "numepochs": ("train.epochs",),
    "numtrainepochs": ("train.epochs",),
    "steps": ("train.max_steps",),
    "trainsteps": ("train.max_steps",),
    "numsteps": ("train.max_steps",),
    "totalsteps": ("train.max_steps",),
    "randomseed": ("train.seed",),
    "maxlen": ("data.max_length",),
    "maxseqlen": ("data.max_length", "data.pack_length"),
    "maxseqlength": ("data.max_length", "data.pack_length"),
    "seqlen": ("data.max_length", "data.pack_length"),
    "seqlength": ("data.max_length", "data.pack_length"),
    "cutofflen": ("data.max_length",),
    "contextlength": ("data.pack_length",),
    "blocksize": ("data.pack_length",),
    "packing": ("data.pack_length",),
    "model": ("model.path",),
    "basemodel": ("model.path",),
    "modelname": ("model.path",),
    "modelnameorpath": ("model.path",),
    "dataset": ("data.train",),
    "datasetconfig": ("data.subset",),
    "datasetconfigname": ("data.subset",),
    "datasetsplit": ("data.split",),
    "datasettrainsplit": ("data.split",),
    "datasettestsplit": ("data.eval_split",),
    "datasettextfield": ("data.columns",),
    "columnmapping": ("data.columns",),
    "mixing": ("data.mixture",),
    "samplingprobabilities": ("data.mixture",),
    "interleaveprobs": ("data.mixture",),
    "datasetpath": ("data.train",),
    "traindata": ("data.train",),
    "trainfile": ("data.train",),
    "trainfiles": ("data.train",),
    "evalfile": ("data.eval",),
    "valdata": ("data.eval",),
    "valfiles": ("data.eval",),
    "validation": ("data.eval",),
    "dtype": ("precision.compute", "precision.params"),
    "bf16": ("precision.compute", "precision.params"),
    "fp8": ("precision.matmul",),
    "float8": ("precision.matmul",),
    "fp32": ("precision.compute", "precision.params"),
    "gradientcheckpointing": ("remat",),
    "activationcheckpointing": ("remat",),
    "recompute": ("remat",),
    "attnimplementation": ("attention.implementation",),
    "flashattention": ("attention.implementation",),
    "loss": ("objective.name",),
    "losstype": ("objective.weighting", "objective.name"),
    "usedftloss": ("objective.weighting",),
    "enabledftloss": ("objective.weighting",),
    "useeaftloss": ("objective.weighting",),
    "useeaft": ("objective.weighting",),
    "eaftk": ("objective.weighting_parameter",),
    "focalgamma": ("objective.weighting_parameter",),
    "lossweights": ("data.token_weights_key",),
    "tokenweights": ("data.token_weights_key",),
    "saveevery": ("checkpoint.every",),
    "savesteps": ("checkpoint.every",),
    "saveinterval": ("checkpoint.every",),
    "savetotallimit": ("checkpoint.keep",),
    "evalsteps": ("eval.every",),
    "evalevery": ("eval.every",),
    "evalinterval": ("eval.every",),
    "wandbproject": ("log.wandb",),
    "eostoken": ("data.eos_token",),
    "numworkers": ("data.workers",),
}


def nearest(name: str, names: Iterable[str]) -> str:
    """' (nearest: a, b)' for the known names most like `name`, or ''."""
    return _said(difflib.get_close_matches(name, list(names), n=3, cutoff=0.5))


def nearest_field(name: str, fields: Iterable[str]) -> str:
    """As `nearest`, for a dotted config field.

    First the fields with the same leaf in another group, and those that other trainers call so; then close spellings of
    the whole name or of its leaf.
    """
    fields = list(fields)
    if meant := meant_fields(name, fields):
        return _said(meant)
    leaf = _leaf(name)
    spelt = difflib.get_close_matches(name, fields, n=3, cutoff=0.7)
    leaves = difflib.get_close_matches(leaf, {field.rpartition(".")[2] for field in fields}, n=3, cutoff=0.7)
    spelt += [field for part in leaves for field in fields if field.rpartition(".")[2] == part and field not in spelt]
    return _said(spelt[:3]) if spelt else nearest(name, fields)


def meant_fields(name: str, fields: Iterable[str]) -> list[str]:
    """The fields with the leaf of `name` in any group, the closest first, and those that other trainers call so."""
    fields, leaf = list(fields), _leaf(name)
    same = [field for field in fields if field.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(name, same, n=3, cutoff=0)
    meant = [field for field in _ALIASES.get(leaf.replace("_", ""), ()) if field in fields]
    return [*close, *(field for field in meant if field not in close)]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].replace("-", "_").lower()


def _said(names: list[str]) -> str:
    return f" (nearest: {', '.join(names)})" if names else ""
