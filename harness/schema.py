"""The schema of a configuration: every key, its type, its default and its limits.

The sections launch and slurm are in ``harness.launch_schema``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from harness.dataset_table import OPTIONAL, check_dataset
from harness.launch_schema import Launch, Slurm
from harness.model_table import check_model
from harness.optimizer_table import OPTIMIZERS, REFUSED, check_optimizer, choice_of
from harness.own_names import check_own, is_own
from harness.section import Count, Section
from harness.units import PATTERN, Duration
from harness.yamlfile import one_line, shown

Length = Annotated[
    Duration,
    BeforeValidator(Duration.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": PATTERN}),
]
_POSITIVE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1e30}
_Options = WithJsonSchema({"type": "object"})
Rate = Annotated[float, Field(ge=0, le=1e30)]  # float32 holds it, with room to be scaled
Factor = Annotated[float, Field(gt=0, le=1e30)]


def _number(value: object, least: float, valid: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least < value <= 1e30:
        raise ValueError(f"must be {valid}, not {shown(value)}")
    return float(value)


def _factors(value: object) -> float | list[float]:
    valid = "a number more than 0 and at most 1e30, or a list of such numbers"
    if not isinstance(value, list):
        return _number(value, 0.0, valid)
    if not value:
        raise ValueError(f"must be {valid}, not an empty list")
    return [_number(factor, 0.0, valid) for factor in value]


def _optimum(value: object) -> float | Literal["estimate"]:
    if value == "estimate":
        return "estimate"
    return _number(value, -1e30, "a number or estimate")


def _options(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"must be a mapping of options, not {shown(value)}")
    return value


class Printed(Section):
    """One result as its source prints it."""

    metric: Annotated[str, Field(min_length=1)]
    """What was measured: accuracy, speedup, error_difference, epochs_to_target …"""
    value: float | None = None
    """As printed; null where the source has only a curve or a bound."""
    below: float | None = None
    """A bound that the source prints instead of a value."""
    note: str | None = None
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    """epochs_to_target: the test accuracy that counts as reached, a fraction."""
    against: Annotated[str, Field(min_length=1)] | None = None
    """error_difference, accuracy_gain, speedup: ``name`` of the runs that it is held against."""


class Paper(Section):
    """Where a recipe comes from and what came out there, for a report to set beside a run."""

    source: Annotated[str, Field(min_length=1)]
    place: Annotated[str, Field(min_length=1)]
    """Table and row, figure or section."""
    printed: list[Printed] = []
    note: str | None = None


class Sizes(Section):
    train: Count
    """Training samples."""
    test: Count
    """Test samples."""


class Data(Section):
    dataset: Annotated[str, Field(min_length=1, max_length=200)]
    """A data set's name; ``harness doctor`` lists all of them, and where each is expected. Or your
    own as package.module:callable."""
    root: Annotated[str, Field(min_length=1)] | None = None
    """Directory of the files; not needed for data that ships with a package or is generated."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Loading processes per rank, for data that is decoded from files; 0: the rank decodes."""
    prefetch: Annotated[int, Field(ge=1, le=1024)] = 4
    """Micro-batches that each worker may be ahead of training."""
    augment: bool = True
    """Random variants of the training images."""
    cutout: Count | None = None
    """augment: side in pixels of a square that is wiped out of each training image (DeVries and
    Taylor 2017); null: none."""
    image_size: Annotated[int, Field(ge=1, le=16384)] | None = None
    """Side in pixels of the images that the model gets, for folders, shards and synthetic images;
    default: 224."""
    size: Count | None = None
    """Training samples of data that is generated (synthetic, digits-enlarged), or of all of
    webdataset's training shards together, which planning would otherwise have to read."""
    sizes: Sizes | None = None
    """package.module:callable: samples of both splits, which a plan cannot ask it for."""
    options: Annotated[dict[str, Any], PlainValidator(_options)] = {}
    """package.module:callable: keyword arguments for it."""
    classes: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Number of classes: synthetic, default 1000; package.module:callable, default: what its
    attribute ``classes`` lists."""
    channels: Annotated[int, Field(ge=1, le=1024)] | None = None
    """synthetic: channels of an image; default: 3."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """An image that cannot be decoded stops the run, or is left out and counted."""
    share: bool = True
    """Ranks of one host hold one copy of what is in memory, instead of one each."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_dataset(self.dataset, self.root, {key: getattr(self, key) for key in OPTIONAL})
        if is_own(self.dataset):
            self._check_own()
        elif self.options:
            raise ValueError(
                f"data.options has no meaning for data.dataset = {self.dataset}; it belongs to "
                "your own, package.module:callable"
            )
        if self.cutout is not None and not self.augment:
            raise ValueError(f"data.cutout = {self.cutout} needs data.augment = true")
        if self.cutout is not None and self.dataset == "synthetic":
            raise ValueError("data.cutout has no meaning for data.dataset = synthetic")
        return self

    def _check_own(self) -> None:
        if self.sizes is None:
            raise ValueError(
                f"data.sizes is needed for data.dataset = {self.dataset}, as {{train: 50000, test: "
                "10000}: a plan, which imports nothing of yours, cannot ask it for its length"
            )
        for key, value in (("cutout", self.cutout), ("workers", self.workers or None)):
            if value is not None:
                raise ValueError(
                    f"data.{key} = {value} has no meaning for data.dataset = {self.dataset}, which "
                    "makes its images itself"
                )


class Model(Section):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    """lenet5, resnet20 …, one of torchvision's, or your own as package.module:callable."""
    options: Annotated[dict[str, Any], PlainValidator(_options), _Options] = {}
    """Keyword arguments of the model's constructor."""
    zero_gamma: bool = False
    """Residual blocks begin as the identity: the scale of each one's last batch norm starts at 0
    (Goyal et al. 2017, section 5.1)."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        check_model(self.name, self.options)
        return self


class FixedGrowth(Section):
    policy: Literal["fixed"] = "fixed"


class ListedStage(Section):
    start: Length
    """When the stage begins, from the start of the run."""
    batch: Count
    """Its global batch."""


class ListGrowth(Section):
    """Stages written out; batch.initial holds until the first of them."""

    policy: Literal["list"]
    stages: Annotated[list[ListedStage], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        starts = [stage.start for stage in self.stages]
        check_ascending("batch.growth.stages.{}.start", starts)
        return self


class GeometricGrowth(Section):
    """B0 · factor^⌊t / every⌋ (AdaBatch, Devarakonda et al. 2017; GeoDamp)."""

    policy: Literal["geometric"]
    factor: Annotated[float, Field(ge=1)] = 2.0
    """What the global batch is multiplied with at each growth."""
    every: Length
    """Length of a stage."""


class LinearGrowth(Section):
    """⌈B0 + rate · ⌊t / every⌋⌉ (PadaDamp)."""

    policy: Literal["linear"]
    rate: Factor
    """Samples by which the global batch grows in each period."""
    every: Length = Duration.parse("1up")
    """The period: an update, as PadaDamp has it, or longer for fewer stages."""


class _Measured(Section):
    """What all policies share that decide from measurements. They never ask for less than
    batch.initial."""

    dwell: Length = Duration.parse("1ep")
    """Time between decisions."""
    wait: Length | None = None
    """No growth before this time."""


class LossGrowth(_Measured):
    """⌈B0 · (F(w0) − F*) / (F(w) − F*)⌉ (AdaDamp, Sievert and Charles, Algorithm 1)."""

    policy: Literal["loss"]
    optimum: Annotated[
        float | Literal["estimate"],
        PlainValidator(_optimum),
        WithJsonSchema({"anyOf": [{"type": "number", "maximum": 1e30}, {"const": "estimate"}]}),
    ] = 0.0
    """F*: the least loss, if known; estimate: extrapolated from the last three decisions."""
    loss: Literal["running", "sample", "full"] = "running"
    """F: smoothed loss of the updates, or the training set's, of a sample of it or in full."""
    sample: Count = 1000
    """Training samples that loss: sample measures at each decision."""
    memory: Length = Duration.parse("0.1ep")
    """Time over which loss: running is smoothed."""
    limit: Annotated[float, Field(gt=1, le=1e30)] | None = None
    """Largest growth in one decision, as a factor; null: none."""


class RollingGrowth(_Measured):
    """B0 · q0 / q, q the rolling mean of ‖g‖² + loss_weight · loss (RadaDamp)."""

    policy: Literal["rolling"]
    memory: Length = Duration.parse("1000up")
    """Time over which q is averaged."""
    loss_weight: Rate = 0.01
    wait: Length | None = Duration.parse("50up")
    """q0 is the mean over this time; there is no growth before its end."""
    limit: Annotated[float, Field(gt=1, le=1e30)] | None = None
    """Largest growth in one decision, as a factor; null: none."""


class NoiseGrowth(_Measured):
    """ratio × the gradient noise scale tr(Σ) / ‖G‖² (McCandlish et al. 2018)."""

    policy: Literal["noise"]
    ratio: Factor = 1.0
    """Global batch that is wanted, in noise scales."""
    hysteresis: Annotated[float, Field(ge=0, le=1e6)] = 0.25
    """The batch stays unless another one is wanted that differs by more than this share."""
    limit: Annotated[float, Field(gt=1, le=1e30)] | None = 2.0
    """Largest growth in one decision, as a factor; null: none."""
    memory: Length = Duration.parse("0.5ep")
    """Time over which tr(Σ) and ‖G‖² are smoothed."""


class SpeedModel(Section):
    """Coefficients of the time of an update (docs/scaling.md), in seconds, images and bytes."""

    per_image: Annotated[float, Field(ge=1e-15, le=1e9)]
    fixed: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    """Of an update, whatever its images."""
    jitter: Annotated[float, Field(ge=0, le=10)] = 0.0
    gamma: Annotated[float, Field(ge=1, le=1e6)] = 1.0
    """1: communication comes after compute; large: the longer one hides the other."""
    within_latency: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """α between the ranks of a node, of a message."""
    within_seconds_per_byte: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """β."""
    between_latency: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """α between nodes."""
    between_seconds_per_byte: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    gradient_bytes: Annotated[float, Field(ge=0, le=1e18)] = 0.0
    """Of an update, per rank."""
    buckets: Count = 1
    """Messages that they travel in."""
    topology: Literal["two-level", "ring"] = "two-level"
    ranks_per_node: Count | None = None
    """null: all on one."""
    measured_ranks: Count | None = None
    """The most ranks that it was fitted to; null: not fitted here."""
    misfit: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """Root mean square of log(fitted / measured)."""


class GoodputGrowth(_Measured):
    """The ranks × accumulation with the most throughput × statistical efficiency (Pollux, Qiao et
    al. 2021; McCandlish et al. 2018)."""

    policy: Literal["goodput"]
    throughput: list[Annotated[str, Field(min_length=1)]] = []
    """Bench, run and probe directories that the model of speed is fitted to when a run starts."""
    model: SpeedModel | None = None
    """What was fitted; given, the files of throughput are not read."""
    ranks: Annotated[list[Count], Field(min_length=1)] | None = None
    """Numbers of ranks to choose from; null: those from ranks.start to ranks.max worth a try."""
    objective: Literal["time", "rank_hours"] = "time"
    """rank_hours: as fast as can be for at most 1 / efficiency times the least rank-hours."""
    efficiency: Annotated[float, Field(gt=0, le=1)] = 0.5
    """objective: rank_hours: progress per rank-hour, over the most there is to be had."""
    hysteresis: Annotated[float, Field(ge=0, le=1e6)] = 0.05
    """The choice stays unless another one has more goodput by this share."""
    limit: Annotated[float, Field(gt=1, le=1e30)] | None = 2.0
    """Largest growth of the batch in one decision, as a factor; null: none."""
    memory: Length = Duration.parse("0.5ep")
    """Time over which tr(Σ) and ‖G‖² are smoothed."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.throughput and self.model is None:
            raise ValueError(
                "batch.growth.throughput is needed with batch.growth.policy = goodput: name "
                "directories of harness bench, harness run or harness probe, or give "
                "batch.growth.model"
            )
        if self.ranks is not None and sorted(set(self.ranks)) != self.ranks:
            raise ValueError(
                f"batch.growth.ranks = {self.ranks}: must be different numbers in ascending order"
            )
        return self


class PlateauGrowth(_Measured):
    """× factor after ``patience`` decisions without a better loss (AdaBatch's code has this)."""

    policy: Literal["plateau"]
    factor: Annotated[float, Field(gt=1, le=1e30)] = 2.0
    patience: Count = 3
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share by which a loss must fall below the best one to count as better."""


MeasuredGrowth = LossGrowth | RollingGrowth | NoiseGrowth | GoodputGrowth | PlateauGrowth
Growth = Annotated[
    FixedGrowth | ListGrowth | GeometricGrowth | LinearGrowth | MeasuredGrowth,
    Field(discriminator="policy"),
]


class Batch(Section):
    initial: Count
    """Global batch at the start, in samples."""
    max: Count | None = None
    """Cap of the global batch; a policy that asks for more gets a smaller rate instead."""
    micro: Count | None = None
    """Samples of one backward pass on one rank; default: 32, or initial where that is less."""
    growth: Growth = FixedGrowth()
    multiple_of: Count = 1
    """What is asked for is rounded up to a multiple of this, such as micro × ranks."""
    shrink: bool = False
    """Whether the batch may become smaller where the policy asks for less."""
    epoch_end: Literal["short", "carry"] = "short"
    """Last update of an epoch: ``short`` takes what the epoch has left, ``carry`` is always full
    and runs on into the next epoch."""

    @property
    def micro_batch(self) -> int:
        return self.micro or min(32, self.initial)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro is not None and self.micro > self.initial:
            raise ValueError(
                f"batch.micro = {self.micro} is more than batch.initial = {self.initial}; "
                f"a micro-batch holds at most one global batch: 1 to {self.initial}"
            )
        if self.max is not None and self.max < self.initial:
            raise ValueError(f"batch.max = {self.max} is less than batch.initial = {self.initial}")
        for key in ("initial", "max"):
            value = getattr(self, key)
            if value is not None and value % self.multiple_of:
                raise ValueError(
                    f"batch.{key} = {value} is not a multiple of batch.multiple_of = "
                    f"{self.multiple_of}; {value - value % self.multiple_of or self.multiple_of} is"
                )
        if isinstance(self.growth, ListGrowth):
            self._check_listed(self.growth.stages)
        if isinstance(self.growth, MeasuredGrowth) and self.max is None:
            raise ValueError(
                f"batch.max is needed with batch.growth.policy = {self.growth.policy}: what is "
                "measured may ask for any batch"
            )
        if isinstance(self.growth, NoiseGrowth | GoodputGrowth) and self.initial == 1:
            raise ValueError(
                "batch.initial = 1 makes one micro-batch; to measure the noise scale two are needed"
            )
        if (
            isinstance(self.growth, NoiseGrowth | GoodputGrowth)
            and self.initial <= self.micro_batch
        ):
            raise ValueError(
                f"batch.micro = {self.micro_batch} makes one micro-batch of batch.initial = "
                f"{self.initial}; to measure the noise scale two or more are needed: micro at most "
                f"{self.initial - 1}"
            )
        return self

    def _check_listed(self, stages: list[ListedStage]) -> None:
        before = self.initial
        for index, stage in enumerate(stages):
            key = f"batch.growth.stages.{index}.batch = {stage.batch}"
            if self.max is not None and stage.batch > self.max:
                raise ValueError(f"{key} is more than batch.max = {self.max}")
            if stage.batch < before and not self.shrink:
                raise ValueError(
                    f"{key} is less than the {before} before it; set batch.shrink: true if the "
                    "batch is to become smaller"
                )
            before = stage.batch


class Ranks(Section):
    start: Count = 1
    """Ranks of the first launch."""
    max: Count | None = None
    """Ranks that later launches may grow to; default: start."""
    prefer: Literal["ranks", "accumulation"] = "ranks"
    """What a growing batch is spread over first."""
    per_node: Count | None = None
    """Ranks on one node, for the plan's node-hours; default: all on one."""
    threads: Count | None = None
    """Threads of each rank; default: the host's cores divided by its ranks."""
    pin: bool = False
    """Bind each rank to cores of its own, where the launcher has not."""
    restart_seconds: Annotated[float, Field(ge=0, le=1e9)] | None = None
    """What it costs to start again with more ranks; default: what the last start took. Ranks do not
    grow for less than that, and accumulation makes up for them; 0: they always grow."""

    @property
    def ceiling(self) -> int:
        return self.max or self.start

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max is not None and self.max < self.start:
            raise ValueError(f"ranks.max = {self.max} is less than ranks.start = {self.start}")
        return self


LARS_ONLY = (
    "trust_coefficient",
    "eps",
    "denominator",
    "lr_in_momentum",
    "clip",
    "decay_at_zero_norm",
)


class Optimizer(Section):
    name: Annotated[str, Field(min_length=1, max_length=200)] = "sgd"
    """lars, lamb, one of torch.optim in lower case, or your own as package.module:callable."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd, lars, rmsprop; 0 for all others."""
    weight_decay: Rate = 0.0
    """0 unless given, adamw's too."""
    nesterov: bool = False
    """sgd, lars."""
    options: Annotated[dict[str, Any], PlainValidator(_options), _Options] = {}
    """What else lamb, or an optimizer of torch.optim, takes: betas, eps, …"""
    skip: list[Annotated[str, Field(min_length=1, max_length=200)]] = []
    """Patterns of parameter names, as *.bias: neither decayed nor, by lars and lamb, adapted."""
    decay_1d: bool | None = None
    """Whether weight decay acts on biases and batch norm's parameters; default: true. lars, lamb:
    see adapt_1d."""
    clip_grad_norm: Factor | None = None
    """A gradient whose L2 norm over all parameters is larger is scaled down to it; null: never."""
    preset: Literal["paper", "mlperf", "larc"] | None = None
    """lars: defaults of the keys below, as one of its definitions has them."""
    trust_coefficient: Factor | None = None
    """lars: η in the trust ratio η‖w‖ / (‖g‖ + β‖w‖ + eps); default: 0.001."""
    eps: Rate | None = None
    """lars: guard of the trust ratio; default: 0."""
    denominator: Literal["sum", "gradient", "decayed"] | None = None
    """lars: what the trust ratio divides by, ‖g‖ + β‖w‖, ‖g‖ (NVIDIA Caffe) or ‖g + βw‖ (optax);
    default: sum."""
    lr_in_momentum: bool | None = None
    """lars: whether the rate is inside the momentum (paper) or outside (LARC); default: true."""
    clip: bool | None = None
    """lars: a layer's rate is at most the global one (LARC); default: false."""
    decay_at_zero_norm: bool | None = None
    """lars: whether a layer is decayed while its gradient is zero (LARC: false); default: true."""
    adapt_1d: bool | None = None
    """lars, lamb: whether biases and batch norm's parameters are adapted and decayed; default:
    false."""
    momentum_scaling: Literal["none", "smith_le"] = "none"
    """smith_le: the part of the scaling rule that the rate may not follow, because of lr.max or
    lr.max_batch, goes to 1 / (1 − momentum) (Smith and Le 2018)."""
    max_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """momentum_scaling goes no further."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            return values
        name = values["name"]
        if name in REFUSED:
            raise ValueError(f"optimizer.name = {name} cannot train here: {REFUSED[name]}")
        default = cls.model_fields["momentum"].default
        given = values.get("momentum", default)
        if name in OPTIMIZERS and not OPTIMIZERS[name].momentum and type(given) in (int, float):
            # The default, or what a base file has for its SGD, asks for nothing.
            return values | {"momentum": 0.0 if given == default else given}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_optimizer(self.name, self.options)
        self._check_shared_keys()
        for name in (*LARS_ONLY, "preset"):
            if self.name != "lars" and getattr(self, name) is not None:
                option = name in choice_of(self.name).options
                hint = f"; {self.name} has optimizer.options.{name}" if option else ""
                raise ValueError(
                    f"optimizer.{name} belongs to optimizer.name = lars, not {self.name}{hint}"
                )
        decays = self.decay_at_zero_norm
        if self.denominator == "decayed" and not (
            self.preset != "larc" if decays is None else decays
        ):
            raise ValueError(
                "optimizer.denominator = decayed needs optimizer.decay_at_zero_norm = true, which "
                f"{'optimizer.preset = larc' if decays is None else 'here'} sets to false"
            )
        if self.adapt_1d is not None and self.name not in ("lars", "lamb"):
            raise ValueError(
                f"optimizer.adapt_1d belongs to optimizer.name = lars or lamb, not {self.name}; "
                "that one has optimizer.decay_1d"
            )
        if self.decay_1d is not None and self.name in ("lars", "lamb"):
            raise ValueError(
                f"optimizer.decay_1d does not belong to optimizer.name = {self.name}, which has "
                "optimizer.adapt_1d"
            )
        if self.momentum_scaling != "none" and self.max_momentum < self.momentum:
            raise ValueError(
                f"optimizer.max_momentum = {self.max_momentum} is less than optimizer.momentum = "
                f"{self.momentum}"
            )
        return self

    def _check_shared_keys(self) -> None:
        """Raise ValueError for a key that all share where this optimizer has nothing like it."""
        choice = choice_of(self.name)
        betas = "; its decay rates are optimizer.options.betas" if "betas" in choice.options else ""
        if not choice.momentum and self.momentum != 0:
            raise ValueError(
                f"optimizer.momentum = {self.momentum}: {self.name} has no momentum{betas}"
            )
        if not choice.momentum and self.momentum_scaling != "none":
            raise ValueError(
                f"optimizer.momentum_scaling = {self.momentum_scaling} needs an optimizer with a "
                f"momentum: {_names_with('momentum')}; {self.name} has none{betas}"
            )
        if self.nesterov and not choice.nesterov:
            raise ValueError(
                f"optimizer.nesterov belongs to optimizer.name = {_names_with('nesterov')}, not "
                f"{self.name}"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("optimizer.nesterov needs optimizer.momentum above 0")
        if self.nesterov and self.options.get("dampening"):
            raise ValueError("optimizer.nesterov needs optimizer.options.dampening = 0")
        for key in ("weight_decay", "skip", "decay_1d"):
            if not choice.weight_decay and getattr(self, key):
                raise ValueError(f"optimizer.{key}: {self.name} has no weight decay")


def _names_with(feature: Literal["momentum", "nesterov"]) -> str:
    return ", ".join(name for name, choice in OPTIMIZERS.items() if getattr(choice, feature))


class Warmup(Section):
    kind: Literal["gradual", "constant"] = "gradual"
    """gradual: in a straight line from the start rate to the scaled rate; constant: the start rate,
    then at once the scaled rate."""
    duration: Length
    start: Rate | None = None
    """Rate at the first update; default: lr.base."""
    per: Literal["update", "epoch"] = "update"
    """gradual: whether the rate moves with each update or stays for an epoch at a time."""
    decayed: bool = True
    """Whether lr.decay acts during the warmup too."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.per == "epoch" and self.kind != "gradual":
            raise ValueError(f"lr.warmup.per = epoch has no meaning with kind = {self.kind}")
        if self.per == "epoch" and (
            self.duration.unit != "ep" or self.duration.value.denominator != 1
        ):
            raise ValueError(
                f"lr.warmup.per = epoch needs a whole number of epochs, not {self.duration}"
            )
        return self


class NoDecay(Section):
    kind: Literal["none"] = "none"


class _FromBegin(Section):
    begin: Length | None = None
    """t counts from here, and the rate does not decay before; default: the start of the run."""


class PolyDecay(_FromBegin):
    """end + (rate − end) · (1 − t)^power, t from 0 at ``begin`` to 1 at the end of the run."""

    kind: Literal["poly"]
    power: Factor = 2.0
    end: Rate = 0.0
    """Rate at the end of the run."""


class CosineDecay(_FromBegin):
    """end + (rate − end) · (1 + cos πt) / 2 (Loshchilov and Hutter 2017, without restarts)."""

    kind: Literal["cosine"]
    end: Rate = 0.0
    """Rate at the end of the run."""


class StepDecay(_FromBegin):
    """factor^⌊t / every⌋."""

    kind: Literal["step"]
    every: Length
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1


class ExponentialDecay(_FromBegin):
    """factor^(t / every), continuously."""

    kind: Literal["exponential"]
    every: Length
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1


class MultistepDecay(Section):
    """× factor at each of the listed times."""

    kind: Literal["multistep"]
    at: Annotated[list[Length], Field(min_length=1)]
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_ascending("lr.decay.at.{}", self.at)
        return self


Decay = Annotated[
    NoDecay | PolyDecay | CosineDecay | StepDecay | ExponentialDecay | MultistepDecay,
    Field(discriminator="kind"),
]


class LearningRate(Section):
    base: Factor
    """Rate for a global batch of base_batch."""
    base_batch: Count | None = None
    """Default: batch.initial."""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the rate follows the global batch."""
    max_batch: Count | None = None
    """The rate follows the global batch up to here only."""
    min: Rate = 0.0
    """The rate never falls below this, in warmup and decay too."""
    max: Factor | None = None
    """The scaled rate never exceeds this."""
    warmup: Warmup | None = None
    decay: Decay = NoDecay()
    on_growth: Annotated[
        float | list[float],
        PlainValidator(_factors),
        WithJsonSchema(
            {"anyOf": [_POSITIVE, {"type": "array", "items": _POSITIVE, "minItems": 1}]}
        ),
    ] = 1.0
    """The rate is multiplied with this each time the global batch grows; a list has one factor for
    each growth, the last one again for all that follow."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"lr.max = {self.max:g} is less than lr.min = {self.min:g}")
        return self


class Comm(Section):
    backend: Literal["horovod", "torch", "solo"] = "horovod"
    """torch: torch.distributed (Gloo, NCCL); solo: a single process without either."""
    controller: Literal["mpi", "gloo"] = "mpi"
    """What carries Horovod's collectives between CPUs."""
    compression: Literal["none", "fp16", "fp16_feedback"] = "none"
    """fp16_feedback: what the cast to fp16 rounds off is added to the next update's gradient."""
    summation: Literal["float", "exact"] = "float"
    """exact: the same weights to the last bit on any number of ranks, for twice the bytes."""
    bucket_mb: Annotated[float, Field(gt=0, le=4096)] = 4.0
    """Size of a gradient bucket in MiB of float32."""
    autotune: bool = False
    """Choose bucket_mb and compression by a short measurement at the start of each launch."""
    cycle_ms: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Horovod's cycle time; default: the harness's choice."""
    fusion_mb: Annotated[float, Field(ge=0, le=4096)] | None = None
    """Horovod's own tensor fusion; default: none. Above 0 its grouping depends on timing, and with
    three or more ranks resuming is then not bitwise."""
    yield_when_idle: bool | None = None
    """Whether MPI ranks that wait give their core away; default: where ranks share cores."""

    @model_validator(mode="before")
    @classmethod
    def _no_bf16(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("compression") == "bf16":
            raise ValueError(
                "comm.compression = bf16: Horovod 0.28.1 cannot carry bfloat16 tensors between "
                "CPUs (torch.distributed could), and a configuration runs on either; "
                "valid are none, fp16 and fp16_feedback"
            )
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.summation == "exact" and self.compression != "none":
            raise ValueError(
                f"comm.summation = exact cannot be compressed; use comm.compression=none instead "
                f"of {self.compression}"
            )
        return self


TRACKERS = ("tensorboard", "mlflow", "wandb")


class Train(Section):
    duration: Length
    """Length of the run."""
    eval_every: Length | None = Duration.parse("1ep")
    """Time between evaluations on the test set; null: only at the end."""
    checkpoint_every: Length | None = Duration.parse("1ep")
    """Time between checkpoints; null: only at the end and on a stop request."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=2**53)] = 3
    """How many of the newest checkpoints stay on disk; at least 2, so one may be broken."""
    log_every: Count = 10
    """Updates in one line of metrics.jsonl."""
    layers_every: Length | None = None
    """Time between lines of layers.jsonl: each layer's norms and trust ratio; null: never."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of forward and backward (autocast); weights and their updates are float32. fp16 scales the
    loss by a power of two that follows what overflows."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a training label that is spread over all classes (Szegedy et al. 2016)."""
    channels_last: bool = False
    """Images and convolutions in NHWC order."""
    compile: bool = False
    """Run the model through torch.compile."""
    sync_batch_norm: bool = False
    """Batch norm over the micro-batches of all ranks, instead of each by itself."""
    loss: Annotated[str, Field(min_length=1, max_length=200)] = "cross_entropy"
    """Or your own as package.module:callable, of (logits, labels)."""
    loss_reduction: Literal["sum", "mean", "none"] | None = None
    """What your own loss returns: the sum or the mean over the samples it gets, or each one's."""
    loss_options: Annotated[dict[str, Any], PlainValidator(_options)] = {}
    """Keyword arguments of your own loss."""
    metric: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Your own as package.module:callable, of (logits, labels), with a value for each sample;
    evaluations record its mean beside the accuracy."""
    metric_options: Annotated[dict[str, Any], PlainValidator(_options)] = {}
    """Keyword arguments of your own metric."""
    tensorboard: bool | None = None
    """Write scalars for TensorBoard; null: if its package is installed and trackers is null."""
    trackers: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = None
    """Who is told of the run as it goes on: tensorboard, mlflow, wandb, or your own as
    package.module:callable."""

    @property
    def wants_tensorboard(self) -> bool | None:
        """None: if its package is installed."""
        if self.tensorboard is None and self.trackers is not None:
            return "tensorboard" in self.trackers
        return self.tensorboard

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_loss()
        self._check_trackers()
        if self.metric is not None:
            check_own("train.metric", self.metric)
        elif self.metric_options:
            raise ValueError("train.metric_options belongs to train.metric, which is not set")
        return self

    def _check_trackers(self) -> None:
        for index, name in enumerate(self.trackers or []):
            if is_own(name):
                check_own(f"train.trackers.{index}", name)
            elif name not in TRACKERS:
                raise ValueError(
                    f"train.trackers.{index} = {one_line(name)} is not known; valid: "
                    f"{', '.join(TRACKERS)}, or your own as package.module:callable"
                )
            if name in (self.trackers or [])[:index]:
                raise ValueError(f"train.trackers.{index} = {name} stands there twice")
        if self.tensorboard is False and "tensorboard" in (self.trackers or []):
            raise ValueError(
                "train.tensorboard = false, and train.trackers has tensorboard; leave one out"
            )

    def _check_loss(self) -> None:
        if is_own(self.loss):
            check_own("train.loss", self.loss)
            if self.loss_reduction is None:
                raise ValueError(
                    f"train.loss_reduction is needed for train.loss = {self.loss}: sum, mean or "
                    "none, whichever it returns over the samples that it gets"
                )
            if self.label_smoothing:
                raise ValueError(
                    f"train.label_smoothing = {self.label_smoothing:g} belongs to train.loss = "
                    f"cross_entropy, not {self.loss}"
                )
            return
        if self.loss != "cross_entropy":
            raise ValueError(
                f"train.loss = {one_line(self.loss)} is not known; valid: cross_entropy, or your "
                "own as package.module:callable"
            )
        for key in ("loss_reduction", "loss_options"):
            if getattr(self, key):
                raise ValueError(
                    f"train.{key} belongs to a loss of your own, package.module:callable, not "
                    f"{self.loss}"
                )


def _updates(value: object) -> list[int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(update) is int for update in value)
        or not 1 <= value[0] <= value[1] < value[0] + 100
    ):
        raise ValueError(
            "must be the first and the last of at most 100 updates, such as [100, 103], not "
            f"{shown(value)}"
        )
    return value


def _traced(value: object) -> Literal["all"] | list[int]:
    if value == "all":
        return "all"
    if (
        not isinstance(value, list)
        or not value
        or not all(type(rank) is int and 0 <= rank < 2**31 for rank in value)
    ):
        raise ValueError(f"must be all, or a list of ranks such as [0, 3], not {shown(value)}")
    return value


class Trace(Section):
    """A trace of some updates by torch.profiler; it slows these down."""

    updates: Annotated[
        list[int],
        PlainValidator(_updates),
        WithJsonSchema(
            {
                "type": "array",
                "items": {"type": "integer", "minimum": 1},
                "minItems": 2,
                "maxItems": 2,
            }
        ),
    ]
    """The first and the last of them, counted from 1 as in metrics.jsonl."""
    ranks: Annotated[
        Literal["all"] | list[int],
        PlainValidator(_traced),
        WithJsonSchema(
            {
                "anyOf": [
                    {"const": "all"},
                    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                ]
            }
        ),
    ] = "all"
    """Which ranks write one."""


class Profile(Section):
    enabled: bool = True
    """Compare the ranks' times in metrics.jsonl, name stragglers, read the machine's counters."""
    trace: Trace | None = None
    timeline: bool = False
    """Horovod's own timeline of its operations (HOROVOD_TIMELINE)."""


class Config(Section):
    """One training run. ``harness plan CONFIG`` shows what it comes to."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    paper: Paper | None = None
    """Where the recipe comes from."""
    data: Data
    model: Model
    batch: Batch
    ranks: Ranks = Ranks()
    optimizer: Optimizer = Optimizer()
    lr: LearningRate
    comm: Comm = Comm()
    train: Train
    profile: Profile = Profile()
    code: Annotated[str, Field(min_length=1)] | None = None
    """Folder in which your own package.module:callable is looked for, after all that is installed;
    from this file's folder if relative. Default: this file's folder."""
    launch: Launch = Launch()
    slurm: Slurm = Slurm()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_shares(self, self.ranks.start)
        self._check_lengths()
        self._check_profile()
        growth = self.batch.growth
        if isinstance(growth, NoiseGrowth | GoodputGrowth) and self.train.sync_batch_norm:
            raise ValueError(
                f"batch.growth.policy = {growth.policy} cannot measure with "
                "train.sync_batch_norm = true: the micro-batches of an update are then no "
                "independent samples"
            )
        if self.comm.backend == "solo" and self.ranks.ceiling > 1:
            raise ValueError(
                f"comm.backend = solo is one process, but ranks asks for {self.ranks.ceiling}; "
                "use comm.backend=horovod"
            )
        return self

    def own_parts(self) -> dict[str, str]:
        """Keys that name a callable of the user's -> what they name."""
        named = {
            "model.name": self.model.name,
            "data.dataset": self.data.dataset,
            "optimizer.name": self.optimizer.name,
            "train.loss": self.train.loss,
            "train.metric": self.train.metric or "",
        }
        return {key: name for key, name in named.items() if is_own(name)}

    def _check_profile(self) -> None:
        trace, total = self.profile.trace, self.train.duration
        if trace is not None and total.unit == "up" and trace.updates[0] > total.value:
            raise ValueError(
                f"profile.trace.updates begins at {trace.updates[0]}, after train.duration = "
                f"{total}"
            )
        if self.profile.timeline and self.comm.backend != "horovod":
            raise ValueError(
                "profile.timeline = true is Horovod's, and comm.backend = "
                f"{self.comm.backend}; use comm.backend=horovod"
            )

    def _check_lengths(self) -> None:
        growth, warmup, decay, total = (
            self.batch.growth,
            self.lr.warmup,
            self.lr.decay,
            self.train.duration,
        )
        for section, prefix, names in (
            (growth, "batch.growth", ("every", "dwell", "memory")),
            (decay, "lr.decay", ("every",)),
            (warmup, "lr.warmup", ("duration",)),
            (self.train, "train", ("duration", "eval_every", "checkpoint_every")),
        ):
            for name in names:
                length = getattr(section, name, None)
                if length is not None and not length:
                    raise ValueError(f"{prefix}.{name} must be more than 0")
        for key, length in (
            ("lr.warmup.duration", warmup and warmup.duration),
            ("lr.decay.begin", getattr(decay, "begin", None)),
        ):
            if length and length.unit == total.unit and length.value > total.value:
                hint = "; lr.warmup=null has none" if key == "lr.warmup.duration" else ""
                raise ValueError(f"{key} = {length} is longer than train.duration = {total}{hint}")
        begin = getattr(decay, "begin", None)
        if begin is not None:
            key, beside = (
                ("lr.decay.every", decay.every)
                if isinstance(decay, StepDecay | ExponentialDecay)
                else ("train.duration", total)
            )
            if (begin.unit == "up") != (beside.unit == "up"):
                raise ValueError(
                    f"lr.decay.begin = {begin} cannot be set against {key} = {beside}: give both "
                    "in updates, or neither"
                )


def check_ascending(key: str, places: list[Duration]) -> None:
    """Raise ValueError unless each place lies after the one before it; ``key`` has a slot for the
    index. Updates cannot be compared with samples or epochs, nor those two without a data set."""
    for index, (before, after) in enumerate(pairwise(places), start=1):
        name = key.format(index)
        if before.unit != after.unit:
            raise ValueError(
                f"{name} = {after} has another unit than {before} before it; write all in one unit"
            )
        if before.value >= after.value:
            relation = "the same as" if before.value == after.value else "before"
            raise ValueError(
                f"{name} = {after} is {relation} {before}, which stands above it; list them in "
                "ascending order"
            )
    if places and not places[0]:
        raise ValueError(f"{key.format(0)} must be more than 0")


def check_shares(config: Config, ranks: int) -> None:
    """Raise ValueError if some rank would never get a micro-batch of the initial global batch."""
    pieces = -(-config.batch.initial // config.batch.micro_batch)
    if pieces < ranks:
        raise ValueError(
            f"batch.initial = {config.batch.initial} in micro-batches of "
            f"{config.batch.micro_batch} makes {pieces} for {ranks} ranks: some would idle; "
            f"use batch.micro ≤ {config.batch.initial // ranks}, fewer ranks, or a larger batch"
            if config.batch.initial >= ranks
            else f"batch.initial = {config.batch.initial} is less than one sample for each of "
            f"{ranks} ranks; use fewer ranks or a larger batch"
        )
