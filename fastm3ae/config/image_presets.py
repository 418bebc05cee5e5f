"""Named configurations for images without texts; hyper-parameters are those of neighbours of MPMA, or choices of ours.

The figures of MPMA's paper are not known here. Without ``--init-from`` the tower is MAE's of ImageNet, the control.
"""

from collections.abc import Callable

from fastm3ae.config import DataConfig, FinetuneConfig, ImageConfig, OptimConfig, TaskConfig, TrainConfig, VisionConfig

__all__ = ["IMAGE_PRESETS"]


def _run(
    name: str, dataset: str, task: TaskConfig, batch_size: int, head_lr_multiplier: float, weight_decay: float
) -> FinetuneConfig:
    """Returns a run of 50 epochs, which ends after 10 of them in a row without a better one, as MGCA's do.

    MGCA trains only the head, by AdamW at a constant rate. The tower's rate (where it is trained), the warm-up and the
    decay to zero are our choices.
    """
    vision = VisionConfig(kind="vit", weights="vit_base_patch16_224.mae", image_size_px=224, num_blocks=12)
    return FinetuneConfig(
        output=f"runs/{name}",
        task=task,
        model=ImageConfig(vision=vision),
        data=DataConfig(
            root="data/label_arrows",
            datasets=(dataset,),
            train_transform="imagenet_resizedcrop",
            val_transform="imagenet",
        ),
        optim=OptimConfig(
            learning_rate=2e-5,
            head_lr_multiplier=head_lr_multiplier,
            weight_decay=weight_decay,
            beta2=0.999,
            schedule="cosine",
        ),
        train=TrainConfig(
            num_steps=None, num_epochs=50, batch_size=batch_size, validate_every_epochs=1.0, patience=10, num_pictures=0
        ),
    )


def _classes(name: str, batch_size: int) -> FinetuneConfig:
    return _run(name, name, TaskConfig(kind="image_classification"), batch_size, 25.0, 1e-6)


def _pixels(name: str, dataset: str) -> FinetuneConfig:
    return _run(name, dataset, TaskConfig(kind="segmentation", freeze_towers=True), 8, 10.0, 0.05)


def chexpert() -> FinetuneConfig:
    """Find the classes of images. CheXpert's five findings, in batches of 48.

    Command: ``fastm3ae finetune image-classification --preset chexpert --init-from runs/mpma/checkpoints/best``, with
    ``--task.train-frac 0.01`` for 1 % of the labels and ``--task.freeze-towers`` for a linear probe. Batch, length, the
    head's learning rate of 5e-4 and the weight decay of 1e-6 are MGCA's (Wang et al. 2022) for its linear probe; that
    the tower learns at 2e-5 where it is trained is our choice. On their own splits MGCA reports AUROCs of 88.8, 89.1
    and 89.7 % with 1, 10 and 100 % of the labels, MRM (Zhou et al. 2023), fine-tuned, 88.5, 88.5 and 88.7 %.
    """
    return _classes("chexpert", 48)


def nih() -> FinetuneConfig:
    """Find the classes of images. The 14 findings of NIH ChestX-ray14, in batches of 96.

    Command: ``fastm3ae finetune image-classification --preset nih --init-from runs/mpma/checkpoints/best``, and options
    as of the preset chexpert. The batch is MRM's (Zhou et al. 2023); the rest is as for chexpert, because MRM trains by
    SGD and longer (3,000, 30,000 and 200,000 steps). MRM reports AUROCs of 79.4, 84.0 and 85.9 % with 1, 10 and 100 %
    of the labels.
    """
    return _classes("nih", 96)


def rsna() -> FinetuneConfig:
    """Find the classes of images. Pneumonia in RSNA's challenge, in batches of 48.

    Command: ``fastm3ae finetune image-classification --preset rsna --init-from runs/mpma/checkpoints/best``, and
    options and sources as of the preset chexpert. MRM (Zhou et al. 2023) reports AUROCs of 91.3, 92.7 and 93.3 % with
    1, 10 and 100 % of the labels, on its own splits.
    """
    return _classes("rsna", 48)


def siim() -> FinetuneConfig:
    """Find the pixels of a finding. Pneumothorax in SIIM-ACR's challenge, with the tower as it is, in batches of 8.

    Command: ``fastm3ae finetune segmentation --preset siim --init-from runs/mpma/checkpoints/best``, with
    ``--task.train-frac 0.01`` for 1 % of the labels and ``--task.no-freeze-towers`` to train the tower, too. The frozen
    tower, batch, length, a learning rate of 2e-4 and a weight decay of 0.05 are MGCA's (Wang et al. 2022). MGCA trains
    on as many images without a finding as with one, here on all; its loss is another one.
    """
    return _pixels("siim", "siim")


def rsna_masks() -> FinetuneConfig:
    """Find the pixels of a finding. The boxes of RSNA's challenge, filled, with the tower as it is, in batches of 8.

    Command: ``fastm3ae finetune segmentation --preset rsna-masks --init-from runs/mpma/checkpoints/best``, and options
    and sources as of the preset siim.
    """
    return _pixels("rsna-masks", "rsna")


IMAGE_PRESETS: dict[str, dict[str, Callable[[], FinetuneConfig]]] = {
    "image-classification": {"chexpert": chexpert, "nih": nih, "rsna": rsna},
    "segmentation": {"siim": siim, "rsna-masks": rsna_masks},
}
"""By task; the first one is the default."""
