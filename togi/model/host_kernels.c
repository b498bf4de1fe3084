/* Norms and gates of bfloat16 on a CPU; host_kernels.py compiles and calls them. What they compute, and of which shapes, stands in
   host_blocks.py, whose PyTorch operations give the same.

   Everything is float32 inside; bfloat16 is rounded to nearest even where Transformers' layers round. No result depends on the
   number of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : (bf16)rounded;
}

/* exp(-x) to two units in the last place: 2^k e^r with |r| at most ln(2) / 2. Beyond e^88 it is infinite; NaN stays NaN. */
static inline float exp_of_minus(float x) {
    float y = -x;
    y = y < -87.0f ? -87.0f : y;
    y = y > 89.0f ? 89.0f : y;
    float k = rintf(y * 1.44269504f);
    float r = y - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = ((int32_t)k + 127) << 23;
    float two_to_k;
    memcpy(&two_to_k, &power, 4);
    return p * two_to_k;
}

#define ENOUGH 32768 /* values for which a second thread pays */

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
        float share = 1.0f / (1.0f + exp_of_minus(x));
        d_gate[i] = narrow(slope * wide(up[i]) * share * (1.0f + x * (1.0f - share)));
        d_up[i] = narrow(slope * x * share);
    }
}
