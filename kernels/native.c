/* What stands between the matrix products of a CPU step, each in one pass: see native.py.

   Compiled once for float and once, with -DBFLOAT16, for bfloat16. All arithmetic is in float, W
   lanes at a time in the vectors of GCC and clang, which fit them to the processor's.
   Letters as in the Python files: T tokens, D model width, F feed-forward width, H heads of width
   E, G key heads, J queries that share one, Q a block of queries, U its keys, S rows of V logits. */

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
enum { KEPT = 4096, ROUNDS = 7 /* of Philox, as dropout.py */ };

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

/* ---- rmsnorm -------------------------------------------------------------------------------- */

/* h = x + delta (delta may be null, and h then is x), y = h r w, r = 1 / sqrt(mean(h^2) + eps) */
API void norm(const element *x, const element *delta, const element *w, element *h, element *y,
              float *r, long T, long D, float eps, int threads) {
    ROWS
    for (long t = 0; t < T; t++) {
        const element *from = x + t * D;
        lanes squares = {0};
        if (delta) {
            EACH(d, D,
                put(h + t * D + d, left, get(from + d, left) + get(delta + t * D + d, left));
                lanes own = get(h + t * D + d, left);
                squares += own * own;
)
            from = h + t * D;
        } else {
            EACH(d, D, squares += get(from + d, left) * get(from + d, left);)
        }
        r[t] = 1.0f / sqrtf(sum_of(squares) / (float)D + eps);
        EACH(d, D, put(y + t * D + d, left, get(from + d, left) * r[t] * get(w + d, left));)
    }
}

/* dx = r (g - h c) + dh,  g = dy w,  c = r^2 mean(g h);  dh may be null. y once more where wanted */
API void norm_back(const element *dy, const element *h, const element *w, const float *r,
                   const element *dh, element *dx, element *y, long T, long D, int threads) {
    ROWS
    for (long t = 0; t < T; t++) {
        const element *dys = dy + t * D, *hs = h + t * D;
        lanes products = {0};
        EACH(d, D, products += get(dys + d, left) * get(w + d, left) * get(hs + d, left);)
        float c = sum_of(products) / (float)D * r[t] * r[t];
        EACH(d, D,
            lanes own = get(hs + d, left), gain = get(w + d, left);
            lanes found = r[t] * (get(dys + d, left) * gain - own * c);
            if (dh) found += get(dh + t * D + d, left);
            put(dx + t * D + d, left, found);
            if (y) put(y + t * D + d, left, own * r[t] * gain);
)
    }
}

/* ---- swiglu --------------------------------------------------------------------------------- */

/* h = silu(gate) up of (T, 2F) rows, gate first */
API void gated(const element *gate_up, element *h, long T, long F, int threads) {
    ROWS
    for (long t = 0; t < T; t++) {
        const element *gate = gate_up + 2 * t * F, *up = gate + F;
        EACH(f, F,
            lanes g = get(gate + f, left);
            put(h + t * F + f, left, g * sigmoid(g) * get(up + f, left));
)
    }
}

/* dgate = dh up s (1 + g (1 - s)),  dup = dh g s,  s = sigmoid(g); h once more where wanted */
API void gated_back(const element *dh, const element *gate_up, element *dgate_up, element *h, long T,
                    long F, int threads) {
    ROWS
    for (long t = 0; t < T; t++) {
        const element *gate = gate_up + 2 * t * F, *up = gate + F;
        element *dgate = dgate_up + 2 * t * F, *dup = dgate + F;
        EACH(f, F,
            lanes g = get(gate + f, left), u = get(up + f, left), d = get(dh + t * F + f, left);
            lanes s = sigmoid(g), silu = g * s;
            put(dgate + f, left, d * u * (s + silu * (1.0f - s)));
            put(dup + f, left, d * silu);
            if (h) put(h + t * F + f, left, silu * u);
)
    }
}

/* ---- rotation and the layout of heads --------------------------------------------------------- */

/* Turn heads of T rows: (a, b) -> (a cos - sign b sin, b cos + sign a sin), halves a and b.
   Rows of x and out are strided, heads of a row lie side by side; out may be x. */
API void rotate(const element *x, long x_stride, element *out, long out_stride, const float *cosine,
                const float *sine, float sign, long T, long H, long E, int threads) {
    long half = E / 2;
    ROWS
    for (long t = 0; t < T; t++)
        for (long j = 0; j < H; j++) {
            const element *a = x + t * x_stride + j * E, *b = a + half;
            element *to = out + t * out_stride + j * E;
            EACH(e, half,
                lanes c = get_floats(cosine + t * half + e, left);
                lanes s = sign * get_floats(sine + t * half + e, left);
                lanes p = get(a + e, left), q = get(b + e, left);
                put(to + e, left, p * c - q * s);
                put(to + half + e, left, q * c + p * s);
)
        }
}

/* (T, G, L) -> (G, T, L); rows of x are strided, of out they are not */
API void heads_first(const element *x, long x_stride, element *out, long T, long G, long L,
                     int threads) {
    ROWS
    for (long t = 0; t < T; t++)
        for (long g = 0; g < G; g++)
            memcpy(out + (g * T + t) * L, x + t * x_stride + g * L, L * sizeof *x);
}

/* (G, T, L) -> (T, G, L) */
API void tokens_first(const element *x, element *out, long T, long G, long L, int threads) {
    ROWS
    for (long t = 0; t < T; t++)
        for (long g = 0; g < G; g++)
            memcpy(out + (t * G + g) * L, x + (g * T + t) * L, L * sizeof *x);
}

/* the same of sums in float */
API void sums_tokens_first(const float *x, element *out, long T, long G, long L, int threads) {
    ROWS
    for (long t = 0; t < T; t++)
        for (long g = 0; g < G; g++) {
            const float *from = x + (g * T + t) * L;
            EACH(e, L, put(out + (t * G + g) * L + e, left, get_floats(from + e, left));)
        }
}

/* total[g, :n] += part[g, :n], rows of total strided */
API void add_to_sums(float *total, long total_stride, const element *part, long G, long n) {
    for (long g = 0; g < G; g++)
        EACH(i, n,
            float *to = total + g * total_stride + i;
            lanes sum = get_floats(to, left) + get(part + g * n + i, left);
            memcpy(to, &sum, left >= W ? sizeof sum : (left) * sizeof *to);
)
}

/* ---- causal softmax --------------------------------------------------------------------------- */

/* the largest of n numbers; that of no number and NaN is whatever */
INLINE float most(const element *x, long n) {
    lanes found = all(-INFINITY);
    EACH(i, n,
        lanes own = filled(get(x + i, left), left, -INFINITY);
        found = larger(own, found);
)
    return most_of(found);
}

/* In place on (G, Q J, U) scores: row i belongs to query U - Q + i / J, sees the keys up to itself,
   and is 0 beyond. */
API void causal_softmax(element *p, long G, long Q, long J, long U, int threads) {
    ROWS
    for (long i = 0; i < G * Q * J; i++) {
        element *row = p + i * U;
        long seen = U - Q + i % (Q * J) / J + 1;
        float top = most(row, seen);
        lanes sums = {0}, kept[KEPT / W];
        EACH(u, seen,
            lanes own = exponential(filled(get(row + u, left), left, -INFINITY) - top);
            sums += own;
            if (u < KEPT) kept[u / W] = own;
)
        float share = 1.0f / sum_of(sums);
        EACH(u, seen,
            lanes own = u < KEPT ? kept[u / W] : exponential(get(row + u, left) - top);
            put(row + u, left, own * share);
)
        memset(row + seen, 0, (U - seen) * sizeof *row);
    }
}

/* In place on the gradient of p: ds = p (dp - sum(p dp)) */
API void causal_softmax_back(element *ds, const element *p, long G, long Q, long J, long U,
                             int threads) {
    ROWS
    for (long i = 0; i < G * Q * J; i++) {
        element *row = ds + i * U;
        const element *ps = p + i * U;
        long seen = U - Q + i % (Q * J) / J + 1;
        lanes sums = {0};
        EACH(u, seen, sums += get(ps + u, left) * get(row + u, left);)
        float sum = sum_of(sums);
        EACH(u, seen,
            lanes own = get(ps + u, left) * (get(row + u, left) - sum);
            put(row + u, left, own);
)
        memset(row + seen, 0, (U - seen) * sizeof *row);
    }
}

/* ---- cross-entropy ------------------------------------------------------------------------------ */

/* losses[s] = logsumexp(z) - z[label]; where wanted, z becomes softmax(z) - onehot(label) */
API void cross_entropy(element *z, const int64_t *labels, float *losses, long S, long V,
                       int gradient, int threads) {
    ROWS
    for (long s = 0; s < S; s++) {
        element *row = z + s * V;
        float picked = get(row + labels[s], 1)[0], top = most(row, V);
        lanes sums = {0};
        EACH(v, V, sums += exponential(filled(get(row + v, left), left, -INFINITY) - top);)
        float sum = sum_of(sums), share = 1.0f / sum;
        losses[s] = top + logf(sum) - picked;
        if (!gradient) continue;
        EACH(v, V, put(row + v, left, exponential(get(row + v, left) - top) * share);)
        put(row + labels[s], 1, exponential(all(picked - top)) * share - 1.0f);
    }
}

/* ---- dropout -------------------------------------------------------------------------------------- */

/* (T, K) factors: 0 where the Philox-4x32 lane of (column / 8, site, position, draw) is below q,
   else scale; lanes as dropout.py lays them */
API void dropout_mask(element *mask, const int64_t *positions, const int64_t *draws, long T, long K,
                      uint32_t seed, uint32_t site, uint32_t q, float scale, int threads) {
    element kept = narrowed(all(scale))[0];
    ROWS
    for (long t = 0; t < T; t++)
        for (long first = 0; first < K; first += 8 * W) {
            uint32_t found[4][W];
            for (int i = 0; i < W; i++) {
                uint32_t c0 = (uint32_t)(first / 8 + i), c1 = site, k0 = seed, k1 = 0;
                uint32_t c2 = (uint32_t)positions[t], c3 = (uint32_t)draws[t];
                for (int round = 0; round < ROUNDS; round++) {
                    uint64_t m0 = (uint64_t)c0 * 0xD2511F53u, m1 = (uint64_t)c2 * 0xCD9E8D57u;
                    c0 = (uint32_t)(m1 >> 32) ^ c1 ^ k0;
                    c2 = (uint32_t)(m0 >> 32) ^ c3 ^ k1;
                    c1 = (uint32_t)m1;
                    c3 = (uint32_t)m0;
                    k0 += 0x9E3779B9u;
                    k1 += 0xBB67AE85u;
                }
                found[0][i] = c0;
                found[1][i] = c1;
                found[2][i] = c2;
                found[3][i] = c3;
            }
            for (long k = 0; k < 8 * W && first + k < K; k++) {
                uint32_t lane = found[k % 8 / 2][k / 8] >> (k % 2 * 16) & 0xffff;
                mask[t * K + first + k] = lane >= q ? kept : 0;
            }
        }
}
