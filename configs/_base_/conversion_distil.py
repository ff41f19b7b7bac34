"""The last stage of a conversion: all weights, at rates that fall by 0.9 per layer, with a moving average."""

model = dict(stage="distil")
optim_wrapper = dict(
    constructor="LayerDecayOptimWrapperConstructor", optimizer=dict(lr=2e-4), paramwise_cfg=dict(layer_decay=0.9)
)
custom_hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.01)]
