r"""Calibrated samplers: a table learned for one model, from forward passes only.

A page of theory
----------------
**What is exact.**  In the coordinates of :mod:`diffusers_sde.weights` the linear part of the probability-flow ODE is
integrated exactly, and a step is ``x <- a x + sum_j b_j F_j``.  Every multistep sampler without noise is such a table,
so every one of them, and every better one, is a choice of the numbers ``a``, ``b`` and of the times at which the
network is evaluated.  The exact table takes them from a model of F (a polynomial in a clock); a network's F is not a
polynomial, but it is the same network each time: its own trajectories say which numbers fit it.

**What is fitted.**
1. *Teacher.*  S samples are solved with about 100 evaluations each; kept are the states ``z_i`` (normalised by
   ``rho = sqrt(data_std^2 alpha^2 + sigma^2)``) at M nodes and, of the evaluations, only their inner products.
2. *Cost of every possible step.*  The smallest error of ``z_next ~ (1 + a) z_cur + b_0 F_cur + b_1 F_prev`` over all
   weights is a Schur complement ``K_nn - K_nB K_BB^-1 K_Bn`` of the Gram matrix K of these 2M + 1 vectors: all
   M^3 / 6 triples cost no evaluation (:func:`~diffusers_sde.calibration.dynamic_program.step_costs`).
3. *Grid.*  Bellman's recursion over (previous, current) finds the best grid for each number of steps; power grids
   compete with it in rollouts.
4. *Rows.*  The student runs on its own states; each row in turn is the exact row plus the ridge-regularised least
   squares correction that takes these states closest to the teacher's at the next node
   (:func:`~diffusers_sde.calibration.fit.fit_tables`).
5. *Refinement.*  The solution depends smoothly on all weights and on the time at which each row's evaluation is made
   (the state stays where it is).  Finite differences of rollouts give its Jacobian J, once; damped Gauss-Newton steps
   ``-(J'WJ + mu diag)^-1 J'Wr`` lower the mean error of the *final* samples, and what the rollout of each step shows
   corrects J (Broyden's update; :mod:`~diffusers_sde.calibration.refine`).  Past states need no weights of their own:
   they are combinations of the present one and of earlier evaluations.  With few steps the grid that fits best is not
   always the one that refines best: up to 6 steps two grids are refined.

**Why it cannot hurt.**  Without data, or with an infinite ridge, a fitted row *is* the exact row.  Refinement accepts
only steps that lower the training error.  And every table, fitted and refined, is tried on noise that the fit has not
seen, next to the exact solver with its own best grid: the best one there is kept, and where that is the exact solver,
that number of steps gets the exact solver.  (A minimum of at most four held-out errors is a little optimistic; the
``calibration`` section of ``diffusers-sde bench`` measures on noise that chose nothing.)

A few dozen numbers are fitted to S times the dimension of a sample of equations, so training and held-out error are
close; both are always reported.

What it does not do: make the network better.  The target is the model's own converged ODE solution, with its guidance.

Stochastic samplers have no error of a sample; for these (``stochastic=True``) the grid and the noise level of each step
are chosen so that the samples' distribution is closest to the teacher's, in energy distance
(:mod:`~diffusers_sde.calibration.stochastic`).

The function is :func:`diffusers_sde.calibration.run.calibrate`; nothing is imported here, so that the command's help
and refusals do not wait for torch.
"""
