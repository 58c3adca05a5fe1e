"""Arguments of `joint-controller train-executor`."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg


@dataclass
class TrainExecutorArguments:
    """
    Arguments of `joint-controller train-executor`.

    The defaults are those of the executor that ships with the package, but for the number of steps: a trial run.
    """

    output_dir: str = HfArg(default="executor", help="Folder for the weights, the log and the results.")
    seed: int = HfArg(default=42, help="Seed of weights, scenes and order.")
    initial_model: str | None = HfArg(
        default=None,
        help="Folder of an executor of the same architecture to start from; words are matched by its tokenizer. Default: random "
        "weights.",
    )
    # Architecture
    view_size: int = HfArg(default=32, help="Side of one square view (global view or crop), in pixels.")
    patch_size: int = HfArg(default=4, help="Side of a patch of the vision tower, in pixels.")
    overlap_margins: list[int] = HfArg(
        default_factory=lambda: [2, 0], help="Patches that a crop shares with its left and right neighbour."
    )
    max_crops: int = HfArg(default=12, help="Most crops an image is cut into, the global view apart.")
    vision_hidden_size: int = HfArg(default=128, help="Width of the vision tower.")
    vision_num_blocks: int = HfArg(default=6, help="Blocks of the vision tower.")
    vision_num_heads: int = HfArg(default=4, help="Attention heads of the vision tower.")
    vit_layers: list[int] = HfArg(
        default_factory=lambda: [-1, -4], help="Blocks of the vision tower that the connector reads."
    )
    hidden_size: int = HfArg(default=192, help="Width of the language model.")
    num_blocks: int = HfArg(default=8, help="Blocks of the language model.")
    num_heads: int = HfArg(default=6, help="Attention heads of the language model.")
    num_experts: int = HfArg(default=16, help="Experts of a block.")
    expert_size: int = HfArg(default=64, help="Inner width of an expert.")
    top_k: int = HfArg(default=8, help="Experts per token, in training and at the full setting.")
    projector_size: int = HfArg(default=384, help="Inner width of the connector's projection.")
    knob_top_k: list[int] = HfArg(
        default_factory=lambda: [1, 2, 4, 8], help="Values of the knob `top_k` that the checkpoint offers."
    )
    knob_num_blocks: list[int] = HfArg(
        default_factory=lambda: [4, 5, 6, 8], help="Values of the knob `num_blocks` that the checkpoint offers."
    )
    # Data
    images_per_step: int = HfArg(default=256, help="Images in a step; all are of one size.")
    easy_vqa_share: float = HfArg(default=0.1, help="Share of the steps on easy-vqa; the others are on scenes.")
    transfer_share: float = HfArg(
        default=0.2, help="Share of the scenes' steps on images of the sizes that no controller is trained on."
    )
    questions_per_image: int = HfArg(default=8, help="Most questions asked about an image in a step.")
    steps_per_new_scenes: int = HfArg(
        default=3, help="Steps for each step's worth of newly drawn scenes; the rest come from the pools."
    )
    pool_size: int = HfArg(
        default=50_000, help="Latest scenes that steps' scenes are chosen from, of all sizes together."
    )
    num_workers: int = HfArg(default=8, help="Processes that draw scenes; 0 draws in the main process.")
    largest_size_scale: float = HfArg(
        default=2.0, help="The first scenes are drawn up to this much larger than those of the test."
    )
    curriculum_share: float = HfArg(
        default=0.3, help="Share of the training after which all scenes have the size of the test's."
    )
    tier_shares: list[float] = HfArg(
        default_factory=lambda: [0.2, 0.2, 0.6], help="Shares of the steps at tiers low, medium, high."
    )
    # Optimisation
    max_steps: int = HfArg(default=2_000, help="Optimiser steps.")
    learning_rate: float = HfArg(default=1e-3, help="Peak learning rate; a cosine takes it to 0.")
    warmup_steps: int = HfArg(default=500, help="Steps over which the learning rate rises.")
    weight_decay: float = HfArg(default=0.05, help="Weight decay of matrices.")
    adam_beta2: float = HfArg(default=0.98, help="AdamW's second beta.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are scaled down to this norm.")
    effective_experts: float = HfArg(
        default=7.6,
        help="Experts that a token's weights are worth (the exponential of their entropy) below which routing is "
        "penalised. Without it each token ends up with one expert, and `top_k` costs nothing and gains nothing.",
    )
    routing_loss_weight: float = HfArg(
        default=0.1, help="Weight of the squared shortfall of that entropy, summed over blocks."
    )
    bf16: bool = HfArg(default=False, help="Train in bfloat16 autocast (on a GPU).")
    compile: bool = HfArg(
        default=False, help="Compile the blocks and record steps as CUDA graphs (GPU only; takes a minute)."
    )
    # Evaluation
    logging_steps: int = HfArg(default=50, help="Steps between two lines of the log.")
    eval_steps: int = HfArg(default=1_000, help="Steps between two evaluations (and checkpoints).")
    eval_images: int = HfArg(default=256, help="Images of each validation split.")
    test_images: int = HfArg(default=1_000, help="Images of each test split; easy-vqa has 1,000.")
    eval_batch_size: int = HfArg(default=250, help="Images in a batch of the evaluation.")
