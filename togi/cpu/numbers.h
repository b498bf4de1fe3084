/* Number formats of the CPU kernels: bfloat16 and float32, and the exponential function. */

#pragma once

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

/* exp(-x) to two units in the last place, as 2^k e^r with |r| at most ln(2) / 2. Results above e^88 are infinite. From x = 87 on
   the result stays e^-87, which is less than 2e-38. NaN stays NaN. */
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
