/* AdamW and the norms of its gradients on a CPU, each in one pass over memory; kernels.py calls them. No result depends on the
   number of threads. */

#include "numbers.h"

enum { PART = 1 << 14 }; /* also in kernels.py */

/* Numbers of one step: master *= keep; mean += new_mean (g - mean); square = old_square square + new_square g g;
   master -= size mean / (sqrt(square) / root + epsilon), with g = factor times the gradient. */
typedef struct {
    float keep, new_mean, old_square, new_square, size, root, epsilon, factor;
} rates;

static inline float value(const void *x, int64_t half, int64_t i) { return half ? wide(((const bf16 *)x)[i]) : ((const float *)x)[i]; }

/* The sum of squares of each PART of `count` values, bfloat16 if `half` or float32. */
void squares(const void *x, int64_t half, double *sums, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < (count + PART - 1) / PART; part++) {
        int64_t stop = (part + 1) * PART < count ? (part + 1) * PART : count;
        double sum = 0;
        if (half) {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = part * PART; i < stop; i++) sum += (double)value(x, 1, i) * value(x, 1, i);
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = part * PART; i < stop; i++) sum += (double)value(x, 0, i) * value(x, 0, i);
        }
        sums[part] = sum;
    }
}

static inline __attribute__((always_inline)) void step(float *master, float *mean, float *square, const void *gradient, int64_t half,
                                                       bf16 *working, const rates *r, int64_t count) {
    const rates n = *r;
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) {
        float g = value(gradient, half, i) * n.factor;
        mean[i] += n.new_mean * (g - mean[i]);
        square[i] = n.old_square * square[i] + n.new_square * g * g;
        master[i] = master[i] * n.keep - n.size * mean[i] / (sqrtf(square[i]) / n.root + n.epsilon);
        working[i] = narrow(master[i]);
    }
}

/* The gradient is bfloat16 if `half`, else float32; `working` gets the master rounded. */
void adamw(float *master, float *mean, float *square, const void *gradient, int64_t half, bf16 *working, const rates *r,
           int64_t count) {
    if (half)
        step(master, mean, square, gradient, 1, working, r, count);
    else
        step(master, mean, square, gradient, 0, working, r, count);
}
