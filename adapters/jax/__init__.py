"""The operators on JAX arrays: differentiable once, under jit, grad and vmap, without copies or callbacks.

A shape, dtype or attribute is checked when a call is traced, and what is wrong is the ValueError or TypeError of the
operator's docstring. What depends on a tensor's values (a roi's image, the place of a level) shows only when the
compiled call runs on the CPU: it arrives as `jax.errors.JaxRuntimeError`, or as a ValueError where JAX had compiled
the same call before, with the same message after "INTERNAL:", and as late as when the result is waited for.

The tensors without a gradient (rois, spatial_shapes, level_start_index) may be NumPy arrays beside JAX arrays; under
jit they become constants.
"""

from cudcn import ops

from .bind import bind, run as run, run_backward as run_backward

dcnv3, dcnv3_backward = bind(ops.dcnv3.OP)
dcnv4, dcnv4_backward = bind(ops.dcnv4.OP)
deform_conv2d, deform_conv2d_backward = bind(ops.deform_conv2d.OP)
deform_psroi_pool, deform_psroi_pool_backward = bind(ops.deform_psroi_pool.OP)
deform_roi_pool, deform_roi_pool_backward = bind(ops.deform_roi_pool.OP)
ms_deform_attn, ms_deform_attn_backward = bind(ops.ms_deform_attn.OP)
psroi_pool, psroi_pool_backward = bind(ops.psroi_pool.OP)
roi_avg_pool, roi_avg_pool_backward = bind(ops.roi_avg_pool.OP)
