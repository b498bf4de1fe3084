/* Causal attention of the segments of a pack on a CPU, where a segment may continue others; kernels.py calls it.

   All computation is in float32. A block of queries is computed at a time, against all keys that its last query sees. So the
   softmax of a row is computed at once, and the backward computes it again from queries and keys. All products use one small
   kernel whose sums stay in registers, except products of two bfloat16 factors (scores, and the gradients of weights). These use
   the processor's instruction for pairs of bfloat16, if it has one: exact products and float32 sums, twice as fast.
   No result depends on the number of threads. Both functions return 0, or 1 if memory is short: results are then incomplete.

   Shape letters: T tokens, H query heads, G key/value heads, D head size, S segments; M keys of one segment. Memory: `spans` has
   pairs of first and last + 1 of the tokens that a segment sees, its own tokens last. Segment s has the spans from bounds[s] to
   bounds[s + 1]. */

#include <stdlib.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "numbers.h"

#ifdef __AVX512F__
enum { LANES = 16, VECTORS = 4 };
#else
enum { LANES = 8, VECTORS = 2 };
#endif
enum { LINE = 64 }; /* bytes of a cache line; all rows start at one */
enum { ROWS = 4, BLOCK = 64 }; /* BLOCK: queries; a multiple of ROWS and of VECTORS * LANES */

typedef float vector __attribute__((vector_size(LANES * 4), aligned(4)));

/* Queries, keys, values or outputs: [heads, T, D], bfloat16 or float32; a row of D values is contiguous. */
typedef struct {
    void *values;
    int64_t head, token;
} view;

typedef struct {
    const int64_t *spans, *bounds;
    int64_t segments, heads, groups, width, half; /* half: views hold bfloat16 */
    float scale;
} table;

/* Scratch memory of a thread: keys and values [M, D], and transposed [D, M] (in pairs of bfloat16: [D / 2, M]), with rows of
   `columns` and `places` floats; three blocks of queries [BLOCK, D] and two of scores [BLOCK, M]. M and D are padded to whole
   blocks and vectors. */
typedef struct {
    float *keys, *values, *keys_turned, *values_turned, *queries, *slopes, *out, *weights, *d_weights;
    int64_t columns, places;
} scratch;

static inline int64_t up_to(int64_t unit, int64_t count) { return (count + unit - 1) / unit * unit; }

/* c [ROWS, vectors] += a b; element (i, k) of a is a[i * a_row + k * a_column]. */
static inline __attribute__((always_inline)) void add_few(int vectors, float *c, int64_t c_row, const float *a, int64_t a_row,
                                                          int64_t a_column, const float *b, int64_t b_row, int64_t inner) {
    vector sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) sums[i][j] = *(const vector *)(c + i * c_row + j * LANES);
    /* the inner loop: each value of b is loaded once for ROWS rows of a */
    for (int64_t k = 0; k < inner; k++) {
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
            for (int j = 0; j < vectors; j++)
                sums[i][j] += a[i * a_row + k * a_column] * *(const vector *)(b + k * b_row + j * LANES);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) *(vector *)(c + i * c_row + j * LANES) = sums[i][j];
}

/* c [rows, columns] += a b. It computes whole groups of ROWS and of LANES: c must have room for them, and a must be readable
   there. BLOCK rows of b, in as many columns as fit into registers, stay in the nearest cache for all rows of a. */
static void add_product(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
                        int64_t rows, int64_t columns, int64_t inner) {
    for (int64_t k = 0; k < inner; k += BLOCK, a += BLOCK * a_column, b += BLOCK * b_row) {
        int64_t depth = inner - k < BLOCK ? inner - k : BLOCK, j = 0;
        for (; j + VECTORS * LANES <= columns; j += VECTORS * LANES)
            for (int64_t i = 0; i < rows; i += ROWS)
                add_few(VECTORS, c + i * c_row + j, c_row, a + i * a_row, a_row, a_column, b + j, b_row, depth);
        for (; j < columns; j += LANES)
            for (int64_t i = 0; i < rows; i += ROWS)
                add_few(1, c + i * c_row + j, c_row, a + i * a_row, a_row, a_column, b + j, b_row, depth);
    }
}

/* Whether products of two bfloat16 factors use the instruction for pairs. */
static int in_pairs(const table *t) {
#ifdef __AVX512BF16__
    return t->half && t->width % 2 == 0;
#else
    return 0;
#endif
}

/* c [rows, columns] = a b' over `width`, where b is transposed in pairs, [width / 2, columns]. `a` has `queries` rows; the last
   row is repeated to fill a group of ROWS. */
static void product_in_pairs(float *c, int64_t c_row, const view *a, int64_t head, int64_t token, const float *b, int64_t b_row,
                             int64_t queries, int64_t columns, int64_t width) {
#ifdef __AVX512BF16__
    for (int64_t i = 0; i < queries; i += ROWS) {
        /* rows of a, read in bfloat16 from the pack itself */
        const bf16 *row[ROWS];
        for (int r = 0; r < ROWS; r++) {
            int64_t own = i + r < queries ? i + r : queries - 1;
            row[r] = (const bf16 *)a->values + head * a->head + (token + own) * a->token;
        }
        for (int64_t j = 0; j < columns; j += VECTORS * LANES) {
            __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_ps();
            /* two values of the width at a time */
            for (int64_t k = 0; k < width / 2; k++) {
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    int pair;
                    memcpy(&pair, row[r] + 2 * k, 4);
                    __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
                    for (int v = 0; v < VECTORS; v++)
                        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, (__m512bh)_mm512_loadu_ps(b + k * b_row + j + v * LANES));
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(c + (i + r) * c_row + j + v * LANES, sums[r][v]);
        }
    }
#endif
}

static void read_row(float *to, const view *from, int64_t head, int64_t token, const table *t) {
    int64_t start = head * from->head + token * from->token;
    if (t->half) {
        const bf16 *row = (const bf16 *)from->values + start;
        for (int64_t d = 0; d < t->width; d++) to[d] = wide(row[d]);
    } else {
        memcpy(to, (const float *)from->values + start, t->width * sizeof(float));
    }
}

static void write_row(const view *to, const float *from, int64_t head, int64_t token, const table *t) {
    int64_t start = head * to->head + token * to->token;
    if (t->half) {
        bf16 *row = (bf16 *)to->values + start;
        for (int64_t d = 0; d < t->width; d++) row[d] = narrow(from[d]);
    } else {
        memcpy((float *)to->values + start, from, t->width * sizeof(float));
    }
}

/* Two neighbouring floats that hold bfloat16 numbers, packed into the memory of one float. */
static inline float as_pair(const float *x) {
    uint32_t low, high;
    memcpy(&low, x, 4);
    memcpy(&high, x + 1, 4);
    uint32_t both = low >> 16 | (high & 0xffff0000u);
    float pair;
    memcpy(&pair, &both, 4);
    return pair;
}

static int64_t keys_of(const table *t, int64_t segment) {
    int64_t keys = 0;
    for (int64_t i = t->bounds[segment]; i < t->bounds[segment + 1]; i++) keys += t->spans[2 * i + 1] - t->spans[2 * i];
    return keys;
}

/* Gather the keys (values) that a segment sees, in order, as [M, D]; and transposed, unless `turned` is null. */
static void gather(float *rows, float *turned, const scratch *s, const view *from, int64_t segment, int64_t group, const table *t) {
    int64_t key = 0;
    for (int64_t i = t->bounds[segment]; i < t->bounds[segment + 1]; i++)
        for (int64_t token = t->spans[2 * i]; token < t->spans[2 * i + 1]; token++, key++)
            read_row(rows + key * s->columns, from, group, token, t);
    for (int64_t first = 0; turned != NULL && first < key; first += LANES) { /* LANES rows at a time, to write whole cache lines */
        if (in_pairs(t))
            for (int64_t pair = 0; pair < t->width / 2; pair++)
                for (int64_t k = first; k < first + LANES; k++)
                    turned[pair * s->places + k] = k < key ? as_pair(rows + k * s->columns + 2 * pair) : 0.0f;
        else
            for (int64_t d = 0; d < t->width; d++)
                for (int64_t k = first; k < first + LANES; k++)
                    turned[d * s->places + k] = k < key ? rows[k * s->columns + d] : 0.0f;
    }
}

/* Scores of a block's queries to weights: the softmax over the keys up to each query's own, and zero beyond. It computes whole
   vectors: the remaining values one by one would take as long as all others. */
static void to_weights(float *scores, int64_t row, int64_t queries, int64_t first_seen, int64_t columns, float scale) {
    for (int64_t i = 0; i < queries; i++, scores += row) {
        int64_t seen = first_seen + i, whole = up_to(LANES, seen);
        float top = -INFINITY, sum = 0;
        /* mask the keys after the query, up to a whole vector */
        for (int64_t k = seen; k < whole; k++) scores[k] = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t k = 0; k < whole; k++) top = scores[k] > top ? scores[k] : top;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < whole; k++) {
            scores[k] = exp_of_minus((top - scores[k]) * scale);
            sum += scores[k];
        }
        sum = 1.0f / sum;
        for (int64_t k = 0; k < whole; k++) scores[k] *= sum;
        for (int64_t k = seen; k < columns; k++) scores[k] = 0;
    }
}

/* Overwrite the gradients of the weights with those of the scores: P (dP - sum P dP) scale. */
static void to_slopes(float *d_weights, const float *weights, int64_t row, int64_t queries, int64_t first_seen, int64_t columns,
                      float scale) {
    for (int64_t i = 0; i < queries; i++, d_weights += row, weights += row) {
        int64_t whole = up_to(LANES, first_seen + i);
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t k = 0; k < whole; k++) along += weights[k] * d_weights[k];
#pragma omp simd
        for (int64_t k = 0; k < whole; k++) d_weights[k] = weights[k] * (d_weights[k] - along) * scale;
        for (int64_t k = whole; k < columns; k++) d_weights[k] = 0;
    }
}

static scratch *new_scratch(const table *t) {
    int64_t most = 0;
    for (int64_t segment = 0; segment < t->segments; segment++) {
        int64_t keys = keys_of(t, segment);
        most = keys > most ? keys : most;
    }
    int64_t columns = up_to(LANES, t->width);
    int64_t places = up_to(BLOCK, most) + LANES; /* + LANES: rows a power of two apart would evict each other from the cache */
    int64_t matrix = columns * places, block = BLOCK * columns, scores = BLOCK * places;
    int64_t floats = 4 * matrix + 3 * block + 2 * scores;
    scratch *s = calloc(1, sizeof(scratch) + LINE + floats * sizeof(float));
    if (s == NULL) return NULL;
    float *next = (float *)(((uintptr_t)(s + 1) + LINE - 1) / LINE * LINE);
    s->columns = columns, s->places = places;
    s->keys = next, next += matrix;
    s->values = next, next += matrix;
    s->keys_turned = next, next += matrix;
    s->values_turned = next, next += matrix;
    s->queries = next, next += block;
    s->slopes = next, next += block;
    s->out = next, next += block;
    s->weights = next, next += scores;
    s->d_weights = next;
    return s;
}

/* Read queries of one head into a block, from `token` on. Returns their number, at most BLOCK. */
static int64_t read_queries(float *to, const scratch *s, const view *from, int64_t head, int64_t token, int64_t left, const table *t) {
    int64_t queries = left < BLOCK ? left : BLOCK;
    for (int64_t i = 0; i < queries; i++) read_row(to + i * s->columns, from, head, token + i, t);
    return queries;
}

static void clear(float *c, int64_t c_row, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++) memset(c + i * c_row, 0, columns * sizeof(float));
}

/* c = `block` times the transposed keys (values). `from` holds the rows of `block` as they are in the pack. */
static void times_turned(float *c, const scratch *s, const float *block, const view *from, int64_t head, int64_t token,
                         const float *turned, int64_t queries, int64_t places, const table *t) {
    if (in_pairs(t)) {
        product_in_pairs(c, s->places, from, head, token, turned, s->places, queries, places, t->width);
    } else {
        clear(c, s->places, up_to(ROWS, queries), places);
        add_product(c, s->places, block, s->columns, 1, turned, s->places, up_to(ROWS, queries), places, t->width);
    }
}

static void forward_of(const table *t, scratch *s, const view *q, const view *k, const view *v, const view *out, int64_t segment,
                       int64_t group) {
    const int64_t *own = t->spans + 2 * (t->bounds[segment + 1] - 1);
    int64_t length = own[1] - own[0], before = keys_of(t, segment) - length, repeats = t->heads / t->groups;
    gather(s->keys, s->keys_turned, s, k, segment, group, t);
    gather(s->values, NULL, s, v, segment, group, t);
    for (int64_t head = group * repeats; head < (group + 1) * repeats; head++)
        for (int64_t first = 0; first < length; first += BLOCK) {
            int64_t queries = read_queries(s->queries, s, q, head, own[0] + first, length - first, t);
            /* the weights: P = softmax(q k') */
            int64_t seen = before + first + queries, rows = up_to(ROWS, queries), places = up_to(BLOCK, seen);
            times_turned(s->weights, s, s->queries, q, head, own[0] + first, s->keys_turned, queries, places, t);
            to_weights(s->weights, s->places, queries, before + first + 1, places, t->scale);
            /* the output: P v */
            clear(s->out, s->columns, rows, s->columns);
            add_product(s->out, s->columns, s->weights, s->places, 1, s->values, s->columns, rows, s->columns, seen);
            for (int64_t i = 0; i < queries; i++) write_row(out, s->out + i * s->columns, head, own[0] + first + i, t);
        }
}

/* `d_keys` and `d_values`: [M, columns] of this segment and group, zero at the start. */
static void backward_of(const table *t, scratch *s, const view *grad, const view *q, const view *k, const view *v, const view *d_q,
                        float *d_keys, float *d_values, int64_t segment, int64_t group) {
    const int64_t *own = t->spans + 2 * (t->bounds[segment + 1] - 1);
    int64_t length = own[1] - own[0], before = keys_of(t, segment) - length, repeats = t->heads / t->groups;
    gather(s->keys, s->keys_turned, s, k, segment, group, t);
    gather(s->values, s->values_turned, s, v, segment, group, t);
    for (int64_t head = group * repeats; head < (group + 1) * repeats; head++)
        for (int64_t first = 0; first < length; first += BLOCK) {
            int64_t queries = read_queries(s->queries, s, q, head, own[0] + first, length - first, t);
            read_queries(s->slopes, s, grad, head, own[0] + first, length - first, t);
            /* P again, and dP = dO v' */
            int64_t seen = before + first + queries, rows = up_to(ROWS, queries), places = up_to(BLOCK, seen);
            times_turned(s->weights, s, s->queries, q, head, own[0] + first, s->keys_turned, queries, places, t);
            to_weights(s->weights, s->places, queries, before + first + 1, places, t->scale);
            times_turned(s->d_weights, s, s->slopes, grad, head, own[0] + first, s->values_turned, queries, places, t);
            /* dv += P' dO */
            int64_t keys = up_to(ROWS, seen);
            add_product(d_values, s->columns, s->weights, 1, s->places, s->slopes, s->columns, keys, s->columns, queries);
            /* dS = P (dP - sum P dP), dk += dS' q, dq = dS k */
            to_slopes(s->d_weights, s->weights, s->places, queries, before + first + 1, places, t->scale);
            add_product(d_keys, s->columns, s->d_weights, 1, s->places, s->queries, s->columns, keys, s->columns, queries);
            clear(s->out, s->columns, rows, s->columns);
            add_product(s->out, s->columns, s->d_weights, s->places, 1, s->keys, s->columns, rows, s->columns, seen);
            for (int64_t i = 0; i < queries; i++) write_row(d_q, s->out + i * s->columns, head, own[0] + first + i, t);
        }
}

int attention(const table *t, const view *q, const view *k, const view *v, const view *out) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        scratch *s = new_scratch(t);
        failed = s == NULL;
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t segment = 0; segment < t->segments; segment++)
            for (int64_t group = 0; group < t->groups; group++)
                if (s != NULL) forward_of(t, s, q, k, v, out, segment, group);
        free(s);
    }
    return failed;
}

/* Adds to `d_k` and `d_v`, float32 [G, T, D] and contiguous. Each segment sums its own gradients first, since segments may share
   keys. */
int attention_backward(const table *t, const view *grad, const view *q, const view *k, const view *v, const view *d_q, float *d_k,
                       float *d_v, int64_t tokens) {
    /* one buffer for the sums of all segments, of which each has its own part */
    int64_t columns = up_to(LANES, t->width), *starts = malloc((t->segments + 1) * sizeof(int64_t));
    if (starts == NULL) return 1;
    starts[0] = 0;
    for (int64_t segment = 0; segment < t->segments; segment++)
        starts[segment + 1] = starts[segment] + up_to(ROWS, keys_of(t, segment)) * columns;
    int64_t all = starts[t->segments];
    float *sums = aligned_alloc(LINE, up_to(LINE, 2 * t->groups * all * sizeof(float)));
    int failed = sums == NULL;
    if (failed) goto done;
#pragma omp parallel reduction(| : failed)
    {
        scratch *s = new_scratch(t);
        failed = s == NULL;
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t segment = 0; segment < t->segments; segment++)
            for (int64_t group = 0; group < t->groups; group++) {
                float *d_keys = sums + 2 * group * all + starts[segment], *d_values = d_keys + all;
                memset(d_keys, 0, (starts[segment + 1] - starts[segment]) * sizeof(float));
                memset(d_values, 0, (starts[segment + 1] - starts[segment]) * sizeof(float));
                if (s != NULL) backward_of(t, s, grad, q, k, v, d_q, d_keys, d_values, segment, group);
            }
        free(s);
/* add up the segments in a fixed order, so that the result does not depend on threads */
#pragma omp for schedule(static) collapse(2)
        for (int64_t group = 0; group < t->groups; group++)
            for (int64_t which = 0; which < 2; which++) {
                const float *from = sums + (2 * group + which) * all;
                float *whole = (which ? d_v : d_k) + group * tokens * t->width;
                for (int64_t segment = 0; segment < t->segments; segment++) {
                    const float *row = from + starts[segment];
                    for (int64_t i = t->bounds[segment]; i < t->bounds[segment + 1]; i++)
                        for (int64_t token = t->spans[2 * i]; token < t->spans[2 * i + 1]; token++, row += columns)
                            for (int64_t d = 0; d < t->width; d++) whole[token * t->width + d] += row[d];
                }
            }
    }
done:
    free(sums);
    free(starts);
    return failed;
}
