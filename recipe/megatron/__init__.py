"""Everything that imports megatron-core. `recipe.megatron.device` must run before the first megatron import."""

from recipe.megatron import device

device.prepare()
