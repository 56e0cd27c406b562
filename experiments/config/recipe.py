"""The resolved options of a run: every default filled in, every size checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from experiments.config import methods
from experiments.config.config import Config, absolute, named_absolutely, option_of
from experiments.config.hyperparameters import HYPERPARAMETERS
from experiments.config.methods import BASE_OPTIMIZERS, METHODS, PERTURBATIONS, MethodSpec
from experiments.data import dataset_spec
from experiments.models import ARCHITECTURES, architecture
from experiments.system.command_line import ArgumentError

T = TypeVar("T")

# Options of perturbed steps, with the values that change nothing.
PERTURBATION_OPTIONS: dict[str, Any] = {
    "group_size": None,
    "start_step": 0,
    "every": 1,
    "perturb": "all",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything except the data that the results of a run depend on. No field is optional.

    Attributes:
        hyperparameters: values by name, for the method, the ascended loss and the base optimizer,
            in the order of `HYPERPARAMETERS`.
        group_size: number of examples that share a perturbation; the batch size for all.
        microbatch_size: number of examples computed at a time; the batch size for all.

    The other attributes are the fields of :class:`Config`.
    """

    dataset: str
    label_noise: float
    model: str
    from_checkpoint: str
    weights: str
    freeze: str
    lora: int
    precision: str
    base: str
    method: str
    perturbation: str
    hyperparameters: Mapping[str, float]
    label_smoothing: float
    crop_padding: int
    flip: bool
    cutout: float
    epochs: int
    batch_size: int
    group_size: int
    microbatch_size: int
    start_step: int
    every: int
    perturb: str
    batch_statistics: str
    seed: int

    @property
    def method_spec(self) -> MethodSpec:
        """The method's entry in `METHODS`."""
        return METHODS[self.method]

    @property
    def label(self) -> str:
        """The method as `--methods` of a comparison names it: "METHOD+LOSS@OPTION=VALUE"."""
        changed = {name: getattr(self, name) for name in PERTURBATION_OPTIONS if self.changes(name)}
        options = [f"@{option_of(name)[2:]}={value}" for name, value in changed.items()]
        return "".join([methods.label_of(self.method, self.perturbation), *options])

    @property
    def key(self) -> tuple:
        """The identity of a run within its task: label, epochs, hyperparameters, seed."""
        values = {name: float(value) for name, value in self.hyperparameters.items()}
        return (self.label, self.epochs, tuple(sorted(values.items())), self.seed)

    def changes(self, name: str) -> bool:
        """Returns whether an option of `PERTURBATION_OPTIONS` changes anything."""
        nothing = PERTURBATION_OPTIONS | {"group_size": self.batch_size}
        return getattr(self, name) != nothing[name]

    @property
    def in_groups(self) -> bool:
        """Whether parts of a batch have separate perturbations."""
        return self.group_size < self.batch_size

    @property
    def in_microbatches(self) -> bool:
        """Whether a batch is computed in parts, to save memory."""
        return self.microbatch_size < self.batch_size

    def gradients_per_step(self, steps: int) -> float:
        """Returns the number of batch gradients per step, averaged over a run of `steps`."""
        gradients = methods.gradients(self.method, self.perturbation, self.hyperparameters)
        perturbed = len(range(self.start_step, steps, self.every))
        return gradients if perturbed == steps else 1 + (gradients - 1) * perturbed / steps

    def examples_left(self, examples: int) -> dict[str, int]:
        """Returns how many of `examples` a step descends on, by the name of the hyperparameter."""
        # 6.999999 stands for 7.
        return {
            name: int(examples * value + 1e-6)
            for name, value in self.hyperparameters.items()
            if HYPERPARAMETERS[name].is_share_of_examples
        }


def resolve(config: Config) -> Recipe:
    """Fills in every default.

    Raises:
        ArgumentError: if values contradict each other.
    """
    spec, usual = METHODS[config.method], dataset_spec(config.dataset)
    perturbation = spec.ascends or config.perturbation or "ce"
    if not spec.perturbs_weights and perturbation != "ce":
        raise ArgumentError(
            f"--perturbation {perturbation} has no meaning for --method {config.method}: nothing "
            "is ascended"
        )
    model = _given(config.model, usual.model)
    base = _given(config.base, architecture(model).base)
    batch_size = _given(config.batch_size, usual.batch_size)
    recipe = Recipe(
        dataset=named_absolutely(config.dataset),
        label_noise=config.label_noise,
        model=model,
        from_checkpoint=absolute(config.from_checkpoint),
        weights=absolute(config.weights),
        freeze=config.freeze,
        lora=config.lora,
        precision=config.precision,
        base=base,
        method=config.method,
        perturbation=perturbation,
        hyperparameters=_hyperparameters(config, perturbation, base),
        label_smoothing=config.label_smoothing,
        crop_padding=_given(config.crop_padding, usual.crop_padding),
        flip=_given(config.flip, usual.flip),
        cutout=_given(config.cutout, usual.cutout),
        epochs=_given(config.epochs, usual.epochs),
        batch_size=batch_size,
        group_size=_given(config.group_size, batch_size),
        microbatch_size=_given(config.microbatch_size, batch_size),
        start_step=config.start_step,
        every=config.every,
        perturb=config.perturb,
        batch_statistics=config.batch_statistics,
        seed=config.seed,
    )
    _check_start(recipe)
    _check_perturbed(recipe)
    _check_sizes(recipe)
    if usual.kind != "images":
        check_no_images(recipe, usual.kind)
    return recipe


def _hyperparameters(config: Config, perturbation: str, base: str) -> dict[str, float]:
    """Returns the hyperparameters that have a meaning: given values, or defaults.

    Raises:
        ArgumentError: if a value is given for another one.
    """
    defaults = METHODS[config.method].defaults
    defaults |= PERTURBATIONS[perturbation] | BASE_OPTIMIZERS[base]
    for name in HYPERPARAMETERS:
        if getattr(config, name) is not None and name not in defaults:
            raise ArgumentError(
                f"{option_of(name)} has no meaning for --method {config.method}, --perturbation "
                f"{perturbation}, --base {base}, which take "
                f"{', '.join(map(option_of, defaults))}"
            )
    return {
        name: _given(getattr(config, name), defaults[name])
        for name in HYPERPARAMETERS
        if name in defaults
    }


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def filled_in(config: Config, recipe: Recipe) -> Config:
    """Returns the options with the values of the recipe; None for other hyperparameters."""
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    known = dict.fromkeys(HYPERPARAMETERS) | dict(values.pop("hyperparameters"))
    return dataclasses.replace(config, **values, **known)


def differences(config: Config) -> list[tuple[str, str, str]]:
    """Returns option, value and default of everything that is not at its default.

    The defaults are those of the data set, the method and the base optimizer. The run folder is
    left out.
    """
    config = dataclasses.replace(config, output=None)
    values = filled_in(config, resolve(config))
    followed = ("dataset", "method", "base", "batch_size")  # by the defaults of others
    usual = Config(**{name: getattr(values, name) for name in followed})
    defaults = filled_in(usual, resolve(usual))
    first = {name: getattr(Config(), name) for name in ("dataset", "method")}
    first["base"] = architecture(values.model or "").base
    first["batch_size"] = dataset_spec(config.dataset).batch_size
    return [
        (option_of(field.name), str(value), "-" if default is None else str(default))
        for field in dataclasses.fields(Config)
        if (value := getattr(values, field.name))
        != (default := first.get(field.name, getattr(defaults, field.name)))
    ]


def _check_start(recipe: Recipe) -> None:
    """Refuses weights that are not for this model."""
    if not recipe.weights:
        return
    if recipe.from_checkpoint:
        raise ArgumentError("--weights and --from-checkpoint both give a start: remove one of them")
    if architecture(recipe.model).family is None:
        known = [name for name, model in ARCHITECTURES.items() if model.family]
        raise ArgumentError(f"--weights needs --model {', '.join(known)}, got {recipe.model}")


def _check_perturbed(recipe: Recipe) -> None:
    """Refuses options that the method cannot follow."""
    for name in filter(recipe.changes, PERTURBATION_OPTIONS):
        if not recipe.method_spec.perturbs_weights:
            raise ArgumentError(
                f"{option_of(name)} has no meaning for --method {recipe.method}: nothing is "
                "perturbed"
            )
        if name == "perturb":
            if recipe.method_spec.moves_all:
                raise ArgumentError(
                    f"--perturb {recipe.perturb} cannot be used with --method {recipe.method}, "
                    "which moves all parameters"
                )
        elif recipe.method_spec.contains_optimizer:
            raise ArgumentError(
                f"{option_of(name)} cannot be used with --method {recipe.method}, which contains "
                "the base optimizer: its steps are whole updates, not gradients"
            )


def check_no_images(recipe: Recipe, kind: str) -> None:
    """Refuses what is only for images.

    Args:
        recipe: the resolved options.
        kind: what the data set has, in the plural.

    Raises:
        ArgumentError: if images would be attacked or augmented.
    """
    if recipe.method_spec.attack:
        raise ArgumentError(
            f"--method {recipe.method} attacks pixels, and {recipe.dataset} has {kind}, not images"
        )
    for name in ("crop_padding", "flip", "cutout"):
        if getattr(recipe, name):
            raise ArgumentError(
                f"{option_of(name)} has no meaning for {recipe.dataset}, which has {kind}, not "
                f"images: add {'--no-flip' if name == 'flip' else option_of(name) + ' 0'}"
            )


def _check_sizes(recipe: Recipe) -> None:
    """Refuses sizes that do not fit each other."""
    for name in ("group_size", "microbatch_size"):
        size = getattr(recipe, name)
        if recipe.batch_size % size:
            raise ArgumentError(
                f"{option_of(name)} must divide --batch-size, got {size} and {recipe.batch_size}"
            )
    whole = "--group-size" if recipe.in_groups else "--batch-size"
    for name, left in recipe.examples_left(recipe.group_size).items():
        if left < 2:
            raise ArgumentError(f"{option_of(name)} leaves less than 2 examples of {whole}")
    if recipe.in_groups and recipe.microbatch_size % recipe.group_size:
        raise ArgumentError(
            f"--microbatch-size must be a multiple of --group-size, got "
            f"{recipe.microbatch_size} and {recipe.group_size}"
        )
