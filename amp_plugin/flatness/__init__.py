"""Measures of flatness: sharpness in the ball, the Hessian's largest eigenvalues and trace, loss landscapes.

They take any model and loader, however the model was trained. `Objective` is the loss, and every measure takes it::

    from amp_plugin.flatness import Objective, epsilon_sharpness, hessian_eigenvalues, hessian_trace

    objective = Objective(model, loader, criterion)
    epsilon_sharpness(objective, epsilon=0.5).sharpness
    hessian_eigenvalues(objective, k=5).values
    hessian_trace(objective).value

``python -m amp_plugin.flatness FOLDER FOLDER`` measures finished runs of the main job and draws pictures.
"""

from amp_plugin.flatness.curvature import Eigenvalues, Trace, hessian_eigenvalues, hessian_trace
from amp_plugin.flatness.landscape import Landscape, filter_normalised_direction, loss_landscape
from amp_plugin.flatness.objective import Evaluation, Objective
from amp_plugin.flatness.pictures import plot_landscapes
from amp_plugin.flatness.sharpness import Sharpness, epsilon_sharpness

__all__ = [
    "Eigenvalues",
    "Evaluation",
    "Landscape",
    "Objective",
    "Sharpness",
    "Trace",
    "epsilon_sharpness",
    "filter_normalised_direction",
    "hessian_eigenvalues",
    "hessian_trace",
    "loss_landscape",
    "plot_landscapes",
]
