"""Rules that turn the two gradients of a pair W = W0 + s B A into better ones: functions of tensors and of r x r solves."""

from lowrank_sys.lora.gram import grams, sylvester


def _of_pair(A, B, solved):
    return solved or grams([B.T, A])


def lora_pro(A, B, grad_A, grad_B, *, scale, damping=1e-8, solved=None):
    """The pair of gradients whose step moves W as near to the full gradient's as a step of both factors can.

    LoRA-Pro (Wang et al. 2025, arXiv:2407.18242, theorems 2.1 and 2.2), with g the gradient of W, grad_A = s Bᵀ g, grad_B = s g Aᵀ:

        g_A = (BᵀB)⁻¹ grad_A / s² + X A,    g_B = (I - B (BᵀB)⁻¹ Bᵀ) grad_B (A Aᵀ)⁻¹ / s² - B X

    minimise |s B g_A + s g_B A - g| for any X; that of BᵀB X + X A Aᵀ = - (BᵀB)⁻¹ grad_A Aᵀ / s² is, of those, nearest to the pair
    that came. A (r, n), B (m, r) and their gradients in fp32 or fp64. damping is added to what is inverted. solved: `Gram` of BᵀB
    and of A Aᵀ where they are known.
    """
    p, q = _of_pair(A, B, solved)
    inverse_p, inverse_q = p.inverse(damping), q.inverse(damping)
    a, b = inverse_p @ grad_A / scale**2, grad_B @ inverse_q / scale**2
    x = sylvester(p, q, -(a @ A.T))
    return a + x @ A, b - B @ (inverse_p @ (B.T @ b) + x)


def riemannian(A, B, grad_A, grad_B, *, scale, damping=1e-6, solved=None):
    """(BᵀB + damping I)⁻¹ grad_A and grad_B (A Aᵀ + damping I)⁻¹: scaled gradient descent on the pair.

    Zhang and Pilanci 2024, arXiv:2402.02347; their code has this damping. Arguments as of `lora_pro`; the scale has no part in it.
    """
    p, q = _of_pair(A, B, solved)
    return p.inverse(damping) @ grad_A, grad_B @ q.inverse(damping)


RULES = {"lora-pro": lora_pro, "riemannian": riemannian}
