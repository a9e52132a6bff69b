"""The one assembly: preprocess -> encoder -> decoder -> head."""

from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from torch import Tensor

from densepred.registry import MODELS, SCOPE
from densepred.semantic_inference import augmented_probabilities, check_sliding, check_tta, slide
from densepred.structures import Features, SegSample


@MODELS.register_module()
class Segmentor(BaseModel):
    """Encoder, decoder and head, joined by the numbers they state about themselves.

    The decoder is built with the encoder's ``channels`` and ``strides``, the head with the decoder's ``channels`` and
    ``level_channels`` and the encoder's ``channels``; a config repeats none of them.

    Args:
        encoder: config of the encoder.
        decoder: config of the decoder, without ``in_channels`` and ``in_strides``.
        head: config of the head, without ``in_channels``, ``level_channels``, ``encoder_channels`` and ``deep_channels``.
        data_preprocessor: config of the preprocessor; without one, images must arrive normalised and stacked.
        init_cfg: MMEngine weight initialisation of the whole model, e.g. ``dict(type="Pretrained", checkpoint=PATH)``.
        sliding: predict in overlapping windows, ``dict(size=(height, width), stride=(rows, columns))``; None = whole images.
        tta: predict by the mean of scaled and mirrored copies, ``dict(scales=factors, flip=bool)``; None = one pass.
            Both need a head that scores every pixel (`SemanticHead`).

    Raises:
        ValueError: ``sliding`` or ``tta`` is malformed, or the head gives no scores that windows could add up.
    """

    def __init__(
        self,
        encoder: dict,
        decoder: dict,
        head: dict,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
        sliding: dict | None = None,
        tta: dict | None = None,
    ) -> None:
        # Built here: MMEngine would look for it in its root registry only.
        super().__init__(MODELS.build(data_preprocessor) if data_preprocessor else None, init_cfg)
        self.encoder = MODELS.build(encoder)
        self.decoder = MODELS.build(
            dict(decoder, in_channels=list(self.encoder.channels), in_strides=list(self.encoder.strides))
        )
        widths = dict(
            in_channels=self.decoder.channels,
            level_channels=list(self.decoder.level_channels),
            encoder_channels=list(self.encoder.channels),
        )
        if deep_channels := list(getattr(self.decoder, "deep_channels", ())):
            widths["deep_channels"] = deep_channels  # for heads that can be supervised deeply
        self.head = MODELS.build(dict(head, **widths))
        check_sliding(sliding)
        check_tta(tta)
        if (sliding or tta) and not hasattr(self.head, "class_logits"):
            raise ValueError(
                f"model.sliding and model.tta (--tta) add up scores of pixels, which {type(self.head).__name__} does not give: "
                "leave them out, or take a SemanticHead"
            )
        self.sliding, self.tta = sliding, tta

    def init_weights(self) -> None:
        """Initialise by ``init_cfg``; "Pretrained" is ours, strict and converting, whatever scope is active."""
        with DefaultScope.overwrite_default_scope(SCOPE):
            super().init_weights()

    def forward(self, inputs: Tensor, data_samples: list[SegSample] | None = None, mode: str = "tensor"):
        """Run the model.

        Args:
            inputs: (B, 3, H, W), normalised, any float dtype.
            data_samples: one sample an image; needed for ``loss`` (targets) and ``predict`` (metadata).
            mode: ``tensor`` for the head's raw outputs, ``loss`` for a dict of losses, ``predict`` for the samples with
                their ``pred_`` fields set.

        Returns:
            A dict of tensors, a dict of scalars or a list of `SegSample`, by ``mode``.

        Raises:
            ValueError: ``mode`` is none of the three.
        """
        if mode not in ("tensor", "loss", "predict"):
            raise ValueError(f"mode={mode!r}: Segmentor knows 'tensor', 'loss' and 'predict'")
        if mode == "loss":
            return self.loss(inputs, data_samples)
        if mode == "predict":
            return self.predict(inputs, data_samples)
        return self.head(self.features(inputs, data_samples))

    def features(self, inputs: Tensor, data_samples: list[SegSample] | None) -> Features:
        """Return what the head reads."""
        return self.decoder(self.encoder(inputs, getattr(self.decoder, "num_maps", None)))

    def loss(self, inputs: Tensor, data_samples: list[SegSample]) -> dict[str, Tensor]:
        """Return the training step's losses, and other scalars to log under names without "loss"."""
        return self.head.loss(self.head(self.features(inputs, data_samples)), data_samples)

    def predict(self, inputs: Tensor, data_samples: list[SegSample]) -> list[SegSample]:
        """Return the samples with the head's ``pred_`` fields set."""
        metas = [sample.metainfo for sample in data_samples]
        if self.tta:
            predictions = [self._predict_augmented(inputs[i : i + 1], meta) for i, meta in enumerate(metas)]
        elif self.sliding:
            predictions = self.head.predict({"sem_logits": self._class_logits(inputs)}, metas)
        else:
            outputs = self.head(self.features(inputs, data_samples), deep_supervision=False)
            if getattr(self.head, "oracle", ()):
                outputs = self.head.apply_oracle(outputs, data_samples)
            predictions = self.head.predict(outputs, metas)
        for sample, fields in zip(data_samples, predictions, strict=True):
            for name, value in fields.items():
                sample.set_field(value, name)
        return data_samples

    def _class_logits(self, images: Tensor) -> Tensor:
        """Return logits (B, C, H, W) of images (B, 3, H, W), in windows if the model slides."""
        if self.sliding:
            return slide(self._logits_of_whole, images, **self.sliding)
        return self._logits_of_whole(images)

    def _logits_of_whole(self, images: Tensor) -> Tensor:
        outputs = self.head(self.features(images, None), deep_supervision=False)
        return self.head.class_logits(outputs, images.shape[-2:])

    def _predict_augmented(self, image: Tensor, meta: dict) -> dict:
        """Return the prediction for one image (1, 3, H, W) from scaled and mirrored copies."""
        height, width = meta["img_shape"]
        ori_shape = meta["ori_shape"]
        image, align_corners = image[..., :height, :width], self.head.align_corners
        scores = augmented_probabilities(self._class_logits, image, ori_shape, **self.tta, align_corners=align_corners)
        finished = dict(meta, img_shape=ori_shape, pad_shape=ori_shape)  # nothing is left to resize
        return self.head.predict({"sem_logits": scores}, [finished])[0]
