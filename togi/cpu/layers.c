/* Norms, gates and the head's softmax of bfloat16 on a CPU; kernels.py calls them. blocks.py documents the functions and shapes
   of norms and gates, and its PyTorch operations give the same results.

   All computation is in float32. Results are rounded to bfloat16 (to nearest even) where Transformers' layers round. No result
   depends on the number of threads. */

#include "numbers.h"

#define ENOUGH 32768 /* the number of values from which more threads are faster */

void norm(const bf16 *x, const bf16 *weight, float epsilon, bf16 *out, float *scale, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > ENOUGH)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = x + row * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += wide(from[i]) * wide(from[i]);
        scale[row] = 1.0f / sqrtf(squares / width + epsilon);
        bf16 *to = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) to[i] = narrow(wide(weight[i]) * wide(narrow(wide(from[i]) * scale[row])));
    }
}

void norm_again(const bf16 *x, const bf16 *weight, const float *scale, bf16 *out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > ENOUGH)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = x + row * width;
        bf16 *to = out + row * width;
        float s = scale[row];
#pragma omp simd
        for (int64_t i = 0; i < width; i++) to[i] = narrow(wide(weight[i]) * wide(narrow(wide(from[i]) * s)));
    }
}

void norm_backward(const bf16 *grad, const bf16 *x, const bf16 *weight, const float *scale, bf16 *d_x, float *d_weight,
                   int64_t block, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > ENOUGH)
    for (int64_t start = 0; start < rows; start += block) {
        /* each block of rows has its own sum for the weight */
        float *own = d_weight + start / block * width;
        int64_t stop = start + block < rows ? start + block : rows;
        for (int64_t row = start; row < stop; row++) {
            const bf16 *from = x + row * width, *slope = grad + row * width;
            bf16 *to = d_x + row * width;
            float s = scale[row], along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t i = 0; i < width; i++) {
                float normal = wide(from[i]) * s, steep = wide(slope[i]);
                own[i] += steep * normal;
                along += steep * wide(weight[i]) * normal;
            }
            along /= width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                to[i] = narrow((wide(slope[i]) * wide(weight[i]) - wide(from[i]) * s * along) * s);
        }
    }
}

void gate(const bf16 *gate, const bf16 *up, bf16 *out, int64_t count) {
#pragma omp parallel for simd schedule(static) if (parallel : count > ENOUGH)
    for (int64_t i = 0; i < count; i++) {
        float x = wide(gate[i]);
        out[i] = narrow(wide(narrow(x / (1.0f + exp_of_minus(x)))) * wide(up[i]));
    }
}

void gate_backward(const bf16 *grad, const bf16 *gate, const bf16 *up, bf16 *d_gate, bf16 *d_up, int64_t count) {
#pragma omp parallel for simd schedule(static) if (parallel : count > ENOUGH)
    for (int64_t i = 0; i < count; i++) {
        float x = wide(gate[i]), slope = wide(grad[i]);
        /* the sigmoid */
        float share = 1.0f / (1.0f + exp_of_minus(x));
        d_gate[i] = narrow(slope * wide(up[i]) * share * (1.0f + x * (1.0f - share)));
        d_up[i] = narrow(slope * x * share);
    }
}

/* For each row of logits, `factor` times `raw`: the target's logit, the log-sum-exp, and the entropy unless it is null. */
void head(const bf16 *raw, float factor, const int64_t *targets, float *chosen, float *norm, float *entropy, int64_t rows,
          int64_t words) {
#pragma omp parallel for schedule(static) if (rows * words > ENOUGH)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = raw + row * words;
        float top = -INFINITY, sum = 0, along = 0;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < words; i++) top = wide(from[i]) > top ? wide(from[i]) : top;
#pragma omp simd reduction(+ : sum, along)
        for (int64_t i = 0; i < words; i++) {
            float below = (wide(from[i]) - top) * factor, weight = exp_of_minus(-below);
            sum += weight;
            along += weight * below;
        }
        chosen[row] = wide(from[targets[row]]) * factor;
        norm[row] = top * factor + logf(sum);
        if (entropy) entropy[row] = logf(sum) - along / sum;
    }
}

/* Overwrite `raw` with its gradient. `targets` count from the first of these words; a target among other words is out of range.
   With p = softmax and S its entropy: d logprob = onehot - p, d S = -p (log p + S); `up_entropy` may be null. */
void head_backward(bf16 *raw, float factor, const float *norm, const float *up, const float *entropy, const float *up_entropy,
                   const int64_t *targets, int64_t rows, int64_t words) {
#pragma omp parallel for schedule(static) if (rows * words > ENOUGH)
    for (int64_t row = 0; row < rows; row++) {
        bf16 *at = raw + row * words;
        float n = norm[row], slope = up[row], steep = up_entropy ? up_entropy[row] : 0, all = up_entropy ? entropy[row] : 0;
        int64_t target = targets[row];
        int here = target >= 0 && target < words;
        /* read before the loop overwrites it */
        float own = here ? wide(at[target]) * factor - n : 0;
#pragma omp simd
        for (int64_t i = 0; i < words; i++) {
            float logp = wide(at[i]) * factor - n;
            at[i] = narrow(-exp_of_minus(-logp) * (slope + steep * (logp + all)) * factor);
        }
        if (here) at[target] = narrow((slope - exp_of_minus(-own) * (slope + steep * (own + all))) * factor);
    }
}
