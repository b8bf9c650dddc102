/* The products of a LoRA branch, a rank wide, in bfloat16: see lora_copied.py.

   For processors with instructions for pairs of bfloat16 products (AVX512-BF16); elsewhere there is
   no `expand` in the library, and the branches are library products. Those are made for squarer
   matrices and reach two thirds of the rate here (LOG.md), which makes a branch dearer than its
   arithmetic. An instruction adds two products to each of 16 float sums, so its right operand holds
   pairs of the inner dimension: [pair][column][2].

   T tokens, R ranks (even), N columns of the wide matrix; all strides are in elements. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define SHARED _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)")

typedef uint16_t bf16;

enum { ROWS = 4, MANY = 8, LANES = 16 };

/* one pair in every lane */
INLINE __m512bh pair(const bf16 *p) {
    int32_t both;
    memcpy(&both, p, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

INLINE __m512bh pairs(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }

INLINE __mmask16 first(long number) {
    return number >= LANES ? 0xffff : (__mmask16)((1u << number) - 1);
}

INLINE __m512 get(const bf16 *p, __mmask16 some) {
    __m256i x = _mm256_maskz_loadu_epi16(some, p);
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}

INLINE void put(bf16 *p, __mmask16 some, __m512 x) {
    _mm256_mask_storeu_epi16(p, some, (__m256i)_mm512_cvtneps_pbh(x));
}

/* ---- pairs ------------------------------------------------------------------------------------- */

/* Rows t and t + 1 of y as pairs; a row beyond the last one counts as zeros. */
INLINE __m512bh down(const bf16 *y, long y_stride, long left, __mmask16 some) {
    const __m256i none = _mm256_setzero_si256();
    const __m256i low = _mm256_maskz_loadu_epi16(some, y);
    const __m256i high = left > 1 ? _mm256_maskz_loadu_epi16(some, y + y_stride) : none;
    const __m512i shifted = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    return (__m512bh)_mm512_or_si512(_mm512_cvtepu16_epi32(low), shifted);
}

/* out[i / 2][j][i % 2] = x[i, j] for i < I and j < J, 0 beyond, to I rounded up and `width` */
static void pair_rows(bf16 *out, long width, const bf16 *x, long x_stride, long I, long J) {
    for (long i = 0; i < I; i += 2) {
        const bf16 *low = x + i * x_stride;
        for (long j = 0; j < width; j += LANES) {
            const __mmask16 some = J > j ? first(J - j) : 0;
            _mm512_storeu_si512(out + i * width + 2 * j,
                                (__m512i)down(low + j, x_stride, I - i, some));
        }
    }
}

/* out[j / 2][i][j % 2] = x[i, j] for i < I and j < J (even), 0 beyond, to `width` */
static void pair_columns(bf16 *out, long width, const bf16 *x, long x_stride, long I, long J) {
    for (long j = 0; j < J; j += 2)
        for (long i = 0; i < width; i++) {
            uint32_t both = 0;
            if (i < I) memcpy(&both, x + i * x_stride + j, sizeof both);
            memcpy(out + j * width + 2 * i, &both, sizeof both);
        }
}

/* Neighbouring rows of m as pairs, [i / 2][j][i % 2], of `width` columns; one of its strides is 1.
   Null where there is no memory. */
static bf16 *paired(const bf16 *m, long row, long column, long I, long J, long width) {
    bf16 *out = malloc((I + I % 2 + 1) * width * sizeof *out);
    if (out && column == 1)
        pair_rows(out, width, m, row, I, J);
    else if (out)
        pair_columns(out, width, m, column, J, I);
    return out;
}

INLINE long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

/* ---- y += s M -------------------------------------------------------------------------------- */

/* y[t, n] += sum_r s[t, r] m[r, n]; 1 where there is no memory, as for all of these */
API int expand(bf16 *y, long y_stride, const bf16 *s, long s_stride, const bf16 *right, long row,
               long across, long T, long R, long N, int threads) {
    const long width = padded(N);
    bf16 *m = paired(right, row, across, R, N, width);
    if (!m) return 1;
    SHARED
    for (long block = 0; block < T; block += ROWS) {
        const long rows = T - block < ROWS ? T - block : ROWS;
        long n = 0;
        for (; rows == ROWS && n + 2 * LANES <= N; n += 2 * LANES) {
            __m512 sum[ROWS][2];
            bf16 *to = y + block * y_stride + n;
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < 2; j++) sum[i][j] = get(to + i * y_stride + j * LANES, 0xffff);
            for (long r = 0; r < R; r += 2) {
                const bf16 *column = m + r * width + 2 * n;
                for (int i = 0; i < ROWS; i++) {
                    const __m512bh own = pair(s + (block + i) * s_stride + r);
                    for (int j = 0; j < 2; j++)
                        sum[i][j] = _mm512_dpbf16_ps(sum[i][j], own, pairs(column + 2 * j * LANES));
                }
            }
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < 2; j++) put(to + i * y_stride + j * LANES, 0xffff, sum[i][j]);
        }
        for (; n < N; n += LANES) {
            const __mmask16 some = first(N - n);
            for (long i = block; i < block + rows; i++) {
                __m512 own = get(y + i * y_stride + n, some);
                for (long r = 0; r < R; r += 2)
                    own = _mm512_dpbf16_ps(own, pair(s + i * s_stride + r),
                                           pairs(m + r * width + 2 * n));
                put(y + i * y_stride + n, some, own);
            }
        }
    }
    free(m);
    return 0;
}

/* ---- s = y M --------------------------------------------------------------------------------- */

/* s[t, r] = sum_n y[t, n] m[n, r] */
API int shrink(bf16 *s, long s_stride, const bf16 *y, long y_stride, const bf16 *right, long row,
               long across, long T, long R, long N, int threads) {
    const long width = padded(R);
    bf16 *m = paired(right, row, across, N, R, width);
    if (!m) return 1;
    SHARED
    for (long block = 0; block < T; block += MANY) {
        const long rows = T - block < MANY ? T - block : MANY;
        for (long r = 0; r < R; r += LANES) {
            const __mmask16 some = first(R - r);
            const bf16 *from = y + block * y_stride;
            bf16 *to = s + block * s_stride + r;
            if (rows == MANY) {
                __m512 sum[MANY] = {0};
                for (long n = 0; n < N; n += 2) {
                    const __m512bh column = pairs(m + n * width + 2 * r);
                    for (int i = 0; i < MANY; i++)
                        sum[i] = _mm512_dpbf16_ps(sum[i], pair(from + i * y_stride + n), column);
                }
                for (int i = 0; i < MANY; i++) put(to + i * s_stride, some, sum[i]);
                continue;
            }
            for (long i = 0; i < rows; i++) {
                __m512 own = _mm512_setzero_ps();
                for (long n = 0; n < N; n += 2)
                    own = _mm512_dpbf16_ps(own, pair(from + i * y_stride + n),
                                           pairs(m + n * width + 2 * r));
                put(to + i * s_stride, some, own);
            }
        }
    }
    free(m);
    return 0;
}

/* ---- G += s^T y -------------------------------------------------------------------------------- */

INLINE void add_scaled(float *g, __mmask16 some, __m512 x, float scale) {
    const __m512 sum = _mm512_fmadd_ps(x, _mm512_set1_ps(scale), _mm512_maskz_loadu_ps(some, g));
    _mm512_mask_storeu_ps(g, some, sum);
}

/* Sixteen ranks from r on, and sixteen columns: add scale times their sums over all tokens. */
INLINE void block_of_sums(float *g, long g_rank, long g_column, const bf16 *s, long width,
                          const bf16 *y, long y_stride, float scale, long T, long ranks,
                          long columns) {
    const __mmask16 some = first(columns);
    __m512 sum[LANES] = {0};
    for (long t = 0; t < T; t += 2) {
        const __m512bh column = down(y + t * y_stride, y_stride, T - t, some);
        for (int i = 0; i < LANES; i++)
            sum[i] = _mm512_dpbf16_ps(sum[i], pair(s + t * width + 2 * i), column);
    }
    float found[LANES][LANES];
    for (int i = 0; i < LANES; i++) _mm512_storeu_ps(found[i], sum[i]);
    const __m512i down_a_column =
        _mm512_mullo_epi32(_mm512_set1_epi32(LANES), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9,
                                                                       10, 11, 12, 13, 14, 15));
    if (g_column == 1)
        for (long i = 0; i < ranks; i++)
            add_scaled(g + i * g_rank, some, _mm512_loadu_ps(found[i]), scale);
    else
        for (long n = 0; n < columns; n++)
            add_scaled(g + n * g_column, first(ranks),
                       _mm512_i32gather_ps(down_a_column, found[0] + n, sizeof(float)), scale);
}

/* g[r * g_rank + n * g_column] += scale * sum_t s[t, r] y[t, n]; one of the strides of g is 1 */
API int add_outer(float *g, long g_rank, long g_column, const bf16 *left, long left_stride,
                  const bf16 *y, long y_stride, float scale, long T, long R, long N, int threads) {
    const long width = padded(R);
    bf16 *s = paired(left, left_stride, 1, T, R, width);
    if (!s) return 1;
    SHARED
    for (long n = 0; n < N; n += LANES)
        for (long r = 0; r < R; r += LANES) {
            const long ranks = R - r < LANES ? R - r : LANES;
            const long columns = N - n < LANES ? N - n : LANES;
            block_of_sums(g + r * g_rank + n * g_column, g_rank, g_column, s + 2 * r, width, y + n,
                          y_stride, scale, T, ranks, columns);
        }
    free(s);
    return 0;
}

#endif
