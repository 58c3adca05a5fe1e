"""Arguments of `joint-controller train-executor`."""

from dataclasses import dataclass, field


@dataclass
class TrainExecutorArguments:
    """
    Arguments of `joint-controller train-executor`.

    The defaults are those of the executor that ships with the package, but for the number of steps: a trial run.
    """

    output_dir: str = field(default="executor", metadata={"help": "Folder for the weights, the log and the results."})
    seed: int = field(default=42, metadata={"help": "Seed of weights, scenes and order."})
    # Architecture
    view_size: int = field(default=32, metadata={"help": "Side of one square view (global view or crop), in pixels."})
    patch_size: int = field(default=4, metadata={"help": "Side of a patch of the vision tower, in pixels."})
    overlap_margins: list[int] = field(
        default_factory=lambda: [2, 0],
        metadata={"help": "Patches that a crop shares with its left and right neighbour."},
    )
    max_crops: int = field(default=9, metadata={"help": "Most crops an image is cut into, the global view apart."})
    vision_hidden_size: int = field(default=128, metadata={"help": "Width of the vision tower."})
    vision_num_blocks: int = field(default=6, metadata={"help": "Blocks of the vision tower."})
    vision_num_heads: int = field(default=4, metadata={"help": "Attention heads of the vision tower."})
    vit_layers: list[int] = field(
        default_factory=lambda: [-1, -4], metadata={"help": "Blocks of the vision tower that the connector reads."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width of the language model."})
    num_blocks: int = field(default=8, metadata={"help": "Blocks of the language model."})
    num_heads: int = field(default=6, metadata={"help": "Attention heads of the language model."})
    num_experts: int = field(default=16, metadata={"help": "Experts of a block."})
    expert_size: int = field(default=64, metadata={"help": "Inner width of an expert."})
    top_k: int = field(default=8, metadata={"help": "Experts per token, in training and at the full setting."})
    projector_size: int = field(default=384, metadata={"help": "Inner width of the connector's projection."})
    knob_top_k: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8],
        metadata={"help": "Values of the knob `top_k` that the checkpoint offers."},
    )
    knob_num_blocks: list[int] = field(
        default_factory=lambda: [4, 5, 6, 8],
        metadata={"help": "Values of the knob `num_blocks` that the checkpoint offers."},
    )
    # Data
    scenes_per_step: int = field(default=224, metadata={"help": "Scenes in a step."})
    easy_vqa_images_per_step: int = field(default=32, metadata={"help": "Images of easy-vqa in a step."})
    questions_per_image: int = field(default=8, metadata={"help": "Most questions asked about an image in a step."})
    steps_per_new_scenes: int = field(
        default=3, metadata={"help": "Steps for each step's worth of newly drawn scenes; the rest come from the pool."}
    )
    pool_size: int = field(default=50_000, metadata={"help": "Latest scenes that a step's scenes are chosen from."})
    num_workers: int = field(default=8, metadata={"help": "Processes that draw scenes; 0 draws in the main process."})
    largest_size_scale: float = field(
        default=2.0, metadata={"help": "The first scenes are drawn up to this much larger than those of the test."}
    )
    curriculum_share: float = field(
        default=0.3, metadata={"help": "Share of the training after which all scenes have the size of the test's."}
    )
    tier_shares: list[float] = field(
        default_factory=lambda: [0.2, 0.2, 0.6], metadata={"help": "Shares of the steps at tiers low, medium, high."}
    )
    # Optimisation
    max_steps: int = field(default=2_000, metadata={"help": "Optimiser steps."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate; a cosine takes it to 0."})
    warmup_steps: int = field(default=500, metadata={"help": "Steps over which the learning rate rises."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of matrices."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's second beta."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    effective_experts: float = field(
        default=7.6,
        metadata={
            "help": "Experts that a token's weights are worth (the exponential of their entropy) below which routing is "
            "penalised. Without it each token ends up with one expert, and `top_k` costs nothing and gains nothing."
        },
    )
    routing_loss_weight: float = field(
        default=0.1, metadata={"help": "Weight of the squared shortfall of that entropy, summed over blocks."}
    )
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 autocast (on a GPU)."})
    compile: bool = field(
        default=False,
        metadata={"help": "Compile the blocks and record steps as CUDA graphs (GPU only; takes a minute)."},
    )
    # Evaluation
    logging_steps: int = field(default=50, metadata={"help": "Steps between two lines of the log."})
    eval_steps: int = field(default=1_000, metadata={"help": "Steps between two evaluations (and checkpoints)."})
    eval_images: int = field(default=256, metadata={"help": "Images of each validation split."})
    test_images: int = field(default=1_000, metadata={"help": "Images of each test split; easy-vqa has 1,000."})
    eval_batch_size: int = field(default=250, metadata={"help": "Images in a batch of the evaluation."})
