/* Vectors of W floats, and elements of either dtype as such: what native.c and attention.c share.

   Compiled once for float and once, with -DBFLOAT16, for bfloat16. All arithmetic is in float, W
   lanes at a time in the vectors of GCC and clang, which fit them to the processor's. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define API __attribute__((visibility("default")))
#define ROWS _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)")
#define INLINE static inline __attribute__((always_inline))

/* a body for W elements at a time from i on, and once more for the `left` ones of the rest */
#define EACH(i, n, ...)                                     \
    {                                                       \
        const long whole_ = (n) / W * W;                    \
        for (long i = 0; i < whole_; i += W) {              \
            const long left = W;                            \
            __VA_ARGS__                                     \
        }                                                   \
        if (whole_ < (n)) {                                 \
            const long i = whole_, left = (n) - whole_;     \
            __VA_ARGS__                                     \
        }                                                   \
    }

#ifdef __AVX512F__
enum { W = 16 };
#else
enum { W = 8 };
#endif

typedef float lanes __attribute__((vector_size(4 * W)));
typedef uint32_t words __attribute__((vector_size(4 * W)));
typedef int32_t choice __attribute__((vector_size(4 * W))); /* -1 where a comparison holds */
typedef uint16_t halves __attribute__((vector_size(2 * W)));

/* ---- arithmetic ------------------------------------------------------------------------------- */

INLINE lanes all(float x) { return x - (lanes){0}; }

INLINE lanes chosen(choice where, lanes a, lanes b) {
    return (lanes)((where & (choice)a) | (~where & (choice)b));
}

/* what has an instruction that no compiler finds by itself */
#ifdef __AVX512F__
INLINE lanes larger(lanes a, lanes b) { return (lanes)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE lanes nearest(lanes x) { return (lanes)_mm512_roundscale_ps((__m512)x, 0); }
INLINE lanes times_power(lanes x, lanes n) { return (lanes)_mm512_scalef_ps((__m512)x, (__m512)n); }
INLINE float sum_of(lanes x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float most_of(lanes x) { return _mm512_reduce_max_ps((__m512)x); }
#else
/* b where one is no number */
INLINE lanes larger(lanes a, lanes b) { return chosen(a > b, a, b); }

/* 1.5 * 2^23: adding it rounds */
INLINE lanes nearest(lanes x) { return x + 12582912.0f - 12582912.0f; }

/* x 2^n, 0 below 2^-126 and too small above 2^127 */
INLINE lanes times_power(lanes x, lanes n) {
    n = chosen(n > 127.0f, all(127.0f), n);
    lanes power = (lanes)(((words)(n + 12582912.0f) + 127) << 23);
    return (lanes)((choice)(x * power) & ~(n < -126.0f));
}

INLINE float sum_of(lanes x) {
    float sum = 0;
    for (int i = 0; i < W; i++) sum += x[i];
    return sum;
}

INLINE float most_of(lanes x) {
    float most = x[0];
    for (int i = 1; i < W; i++) most = x[i] > most ? x[i] : most;
    return most;
}
#endif

/* ---- elements ------------------------------------------------------------------------------- */

#ifdef BFLOAT16
typedef uint16_t element;
typedef halves elements;

#ifdef __AVX512BF16__
INLINE lanes widened(elements x) {
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
}

INLINE elements narrowed(lanes x) { return (elements)_mm512_cvtneps_pbh((__m512)x); }
#else
INLINE lanes widened(elements x) { return (lanes)(__builtin_convertvector(x, words) << 16); }

/* To nearest, ties to even. A NaN stays one: no float here has more than bfloat16's bits of one. */
INLINE elements narrowed(lanes x) {
    words u = (words)x;
    return __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, elements);
}
#endif

/* 1 / x to 1e-8 */
INLINE lanes reciprocal(lanes x) {
#ifdef __AVX512F__
    lanes y = (lanes)_mm512_rcp14_ps((__m512)x);
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

/* Taylor to degree 5: good to 2.5e-6 for |x| <= ln(2) / 2 */
INLINE lanes exponential_near_zero(lanes x) {
    lanes p = x * (1.0f / 120.0f) + 1.0f / 24.0f;
    p = p * x + 1.0f / 6.0f;
    p = p * x + 0.5f;
    p = p * x + 1.0f;
    return p * x + 1.0f;
}
#else
typedef float element;
typedef lanes elements;

INLINE lanes widened(elements x) { return x; }
INLINE elements narrowed(lanes x) { return x; }
INLINE lanes reciprocal(lanes x) { return 1.0f / x; }

/* to 2 units in the last place for |x| <= ln(2) / 2, by the coefficients of Moshier's Cephes */
INLINE lanes exponential_near_zero(lanes x) {
    lanes p = x * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    return p * (x * x) + x + 1.0f;
}
#endif

/* e^x: 0 far below 0, NaN for NaN */
INLINE lanes exponential(lanes x) {
    x = larger(all(-104.0f), x);
    lanes n = nearest(x * 1.44269504f);
    return times_power(exponential_near_zero(x - n * 0.693359375f + n * 2.12194440e-4f), n);
}

/* 0 below -80, so that x sigmoid(x) is 0 far below 0 and NaN at minus infinity */
INLINE lanes sigmoid(lanes x) {
    lanes found = reciprocal(1.0f + exponential(-larger(all(-80.0f), x)));
    return (lanes)((choice)found & ~(x < -80.0f));
}

/* ---- memory ------------------------------------------------------------------------------------- */

/* the next W elements, with zeros behind the last */
INLINE lanes get(const element *p, long left) {
    elements x = {0};
    if (left >= W)
        memcpy(&x, p, sizeof x);
    else
        memcpy(&x, p, left * sizeof *p);
    return widened(x);
}

INLINE void put(element *p, long left, lanes x) {
    elements y = narrowed(x);
    memcpy(p, &y, left >= W ? sizeof y : left * sizeof *p);
}

INLINE lanes get_floats(const float *p, long left) {
    lanes x = {0};
    if (left >= W)
        memcpy(&x, p, sizeof x);
    else
        memcpy(&x, p, left * sizeof *p);
    return x;
}

/* x, with another number behind the last */
INLINE lanes filled(lanes x, long left, float rest) {
    for (long i = left; i < W; i++) x[i] = rest;
    return x;
}
