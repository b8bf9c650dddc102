/* Causal attention of packed documents, forward and backward: see attention_in_c.py.

   Letters as there: T tokens, H query heads of width E, G key heads, J queries that share one; a
   row is one query head of a token, row = token * J + head. Tokens count from their document's
   first one. Scores are held in base 2: 2^(s c) = e^(s / sqrt(E)), c = log2(e) / sqrt(E).

   Products take operands in words of 32 bits along the inner dimension, one float or two bfloat16,
   so that their code is one. The left operand is read word by word, the right one in vectors. */

#include "lanes.h"

#ifdef BFLOAT16
#ifdef __AVX512BF16__
#define HERE 1
#endif
#elif defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define HERE 1
#endif

#ifndef HERE

/* without an instruction for its products nothing here is faster than the library's */
API long attention_room(long slots, long longest, long rows, long E, long G, int workers) {
    return 0;
}

API void attention(void) {}
API void attention_back(void) {}

#else

#ifdef BFLOAT16
typedef uint32_t word;
enum { PAIR = 2 };
#else
typedef float word;
enum { PAIR = 1 };
#endif
typedef word vector __attribute__((vector_size(4 * W)));

#ifdef __AVX512F__
enum { WIDE = 4 };
#else
enum { WIDE = 2 };
#endif
enum {
    DEEP = 6,         /* rows of a tile, which has WIDE vectors of columns: as many sums as fit */
    PANEL = WIDE * W, /* keys, of which a panel holds all words of E beside each other */
    KEYS = 512,       /* whose scores a block holds in the forward pass */
    VALUES = 64 * PAIR, /* whose words stay in the first cache */
    STEP = 64 * PAIR, /* keys of a step of the backward pass; a multiple of PANEL */
};

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most_long(long a, long b) { return a > b ? a : b; }

/* ---- products --------------------------------------------------------------------------------- */

INLINE lanes added(lanes sum, word a, vector b) {
#ifdef BFLOAT16
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    return sum + a * b;
#endif
}

/* c = a b, or c += a b, of m rows and n vectors of columns; a[row * a_m + i * a_k], i < k */
INLINE void tile_of(int m, int n, const word *a, long a_m, long a_k, const word *b, long b_k, long k,
                    float *c, long c_m, int add) {
    lanes sums[DEEP][WIDE];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) sums[i][j] = (lanes){0};
    for (; k > 0; k--) {
        vector right[WIDE];
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) memcpy(&right[j], b + j * W, sizeof *right);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++)
#pragma GCC unroll 8
            for (int j = 0; j < n; j++) sums[i][j] = added(sums[i][j], a[i * a_m], right[j]);
        a += a_k;
        b += b_k;
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) {
            float *to = c + i * c_m + j * W;
            lanes old = {0};
            if (add) memcpy(&old, to, sizeof old);
            old += sums[i][j];
            memcpy(to, &old, sizeof old);
        }
}

typedef void tile(const word *a, long a_m, long a_k, const word *b, long b_k, long k, float *c,
                  long c_m, int add);

#define TILE(m, n)                                                                              \
    static void tile_##m##_##n(const word *a, long a_m, long a_k, const word *b, long b_k,      \
                               long k, float *c, long c_m, int add) {                           \
        tile_of(m, n, a, a_m, a_k, b, b_k, k, c, c_m, add);                                     \
    }
#ifdef __AVX512F__
#define TILES(m) TILE(m, 1) TILE(m, 2) TILE(m, 3) TILE(m, 4)
#define NAMES(m) {tile_##m##_1, tile_##m##_2, tile_##m##_3, tile_##m##_4}
#else
#define TILES(m) TILE(m, 1) TILE(m, 2)
#define NAMES(m) {tile_##m##_1, tile_##m##_2}
#endif
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)
static tile *const tiles[DEEP][WIDE] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4), NAMES(5), NAMES(6)};

/* a tile of at most DEEP rows and PANEL columns, of which it computes whole vectors */
INLINE void one_tile(long m, long n, const word *a, long a_m, long a_k, const word *b, long b_k,
                     long k, float *c, long c_m, int add) {
    tiles[m - 1][(n + W - 1) / W - 1](a, a_m, a_k, b, b_k, k, c, c_m, add);
}

/* a strip of at most DEEP rows and n columns, a multiple of W */
INLINE void strip(long m, long n, const word *a, long a_m, long a_k, const word *b, long b_k, long k,
                  float *c, long c_m, int add) {
    for (long j = 0; j < n; j += PANEL)
        one_tile(m, least(n - j, PANEL), a, a_m, a_k, b + j, b_k, k, c + j, c_m, add);
}

/* ---- operands --------------------------------------------------------------------------------- */

#ifdef __AVX512F__
/* W vectors become their columns, by exchanging blocks of 8, 4, 2 and 1 numbers */
INLINE void transpose(__m512i x[W]) {
#pragma GCC unroll 4
    for (int size = W / 2; size; size /= 2) {
        words low, high;
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
            low[i] = i & size ? W + i - size : i;
            high[i] = i & size ? W + i : i + size;
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
            if (i & size) continue;
            __m512i a = x[i], b = x[i + size];
            x[i] = _mm512_permutex2var_epi32(a, (__m512i)low, b);
            x[i + size] = _mm512_permutex2var_epi32(a, (__m512i)high, b);
        }
    }
}

/* words of n rows from x on as W columns at `to`, zeros behind the last; m words of each */
INLINE void pack_square(word *to, const element *x, long stride, long n, long m) {
    __m512i rows[W];
    __mmask16 there = (__mmask16)((1u << m) - 1);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        rows[i] = i < n ? _mm512_maskz_loadu_epi32(there, x + i * stride) : _mm512_setzero_si512();
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (i < m) _mm512_storeu_si512(to + i * PANEL, rows[i]);
}
#else
INLINE void pack_square(word *to, const element *x, long stride, long n, long m) {
    for (long e = 0; e < m; e++)
        for (long u = 0; u < W; u++)
            if (u < n)
                memcpy(to + e * PANEL + u, x + u * stride + e * PAIR, sizeof *to);
            else
                to[e * PANEL + u] = 0;
}
#endif

/* L rows of E elements as panels: words of E as rows, rows as columns, zeros behind the last */
static void pack_across(word *to, const element *x, long stride, long L, long E) {
    long inner = E / PAIR;
    for (long u = 0; u < L; u += W)
        for (long e = 0; e < inner; e += W)
            pack_square(to + u / PANEL * PANEL * inner + e * PANEL + u % PANEL,
                        x + u * stride + e * PAIR, stride, L - u, least(W, inner - e));
}

/* L rows of E elements as words of PAIR rows each, zeros behind the last */
static void pack_along(word *to, const element *x, long stride, long L, long E) {
#ifdef BFLOAT16
    for (long u = 0; u < L; u += 2, to += E)
        for (long e = 0; e < E; e += W) {
            elements low, high = {0};
            memcpy(&low, x + u * stride + e, sizeof low);
            if (u + 1 < L) memcpy(&high, x + (u + 1) * stride + e, sizeof high);
            words both = __builtin_convertvector(low, words);
            both |= __builtin_convertvector(high, words) << 16;
            memcpy(to + e, &both, sizeof both);
        }
#else
    for (long u = 0; u < L; u++) memcpy(to + u * E, x + u * stride, E * sizeof *to);
#endif
}

/* the heads of n tokens below each other */
INLINE void pack_rows(element *to, const element *x, long stride, long n, long width) {
    for (long t = 0; t < n; t++) memcpy(to + t * width, x + t * stride, width * sizeof *to);
}

/* two rows of W numbers each, as words of PAIR rows */
INLINE void put_rows(word *to, long stride, lanes low, lanes high) {
#ifdef BFLOAT16
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                           8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    both = _mm512_permutexvar_epi16(order, both);
    memcpy(to, &both, sizeof both);
#else
    memcpy(to, &low, sizeof low);
    memcpy(to + stride, &high, sizeof high);
#endif
}

/* ---- softmax ---------------------------------------------------------------------------------- */

#ifdef BFLOAT16
/* 2^f for |f| <= 1/2: fitted for the least relative error, 2.8e-06 */
INLINE lanes power_near_zero(lanes f) {
    lanes p = f * 0.00958285294f + 0.0559064262f;
    p = p * f + 0.240240991f;
    p = p * f + 0.693124175f;
    return p * f + 1.0f;
}
#else
/* 2^f for |f| <= 1/2: to 1e-7, by the coefficients of Moshier's Cephes */
INLINE lanes power_near_zero(lanes f) {
    lanes p = f * 1.535336188e-4f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472029e-1f;
    return p * f + 1.0f;
}
#endif

/* 2^x for x up to 0 or a little more; NaN for NaN */
INLINE lanes power_of_two(lanes x) {
    x = larger(all(-150.0f), x);
    lanes n = nearest(x);
    return times_power(power_near_zero(x - n), n);
}

/* x where a lane counts below n, else 0 */
INLINE lanes first(lanes x, long n) {
    choice number;
    for (int i = 0; i < W; i++) number[i] = i;
    return (lanes)((choice)x & (number < (int)most_long(n, 0)));
}

typedef struct {
    float c;      /* of the scores */
    long J, E, H; /* H: heads of a token in o and its like */
    long queries; /* of a block */
} Shape;

typedef struct {
    word *q;
    float *s, *o, *tops, *sums;
    element *p;
} Ahead;

/* floats from a buffer, whole lines of the cache */
INLINE long take(long *used, long floats) {
    long at = *used;
    *used += (floats + 15) / 16 * 16;
    return at;
}

static long lay_ahead(Ahead *to, float *room, long rows, long E) {
    long used = 0, q = take(&used, rows * E / PAIR), s = take(&used, rows * KEYS);
    long o = take(&used, rows * E), tops = take(&used, rows), sums = take(&used, rows);
    long p = take(&used, rows * KEYS / PAIR);
    if (to)
        *to = (Ahead){(word *)room + q, room + s, room + o, room + tops, room + sums,
                      (element *)(room + p)};
    return used;
}

/* the largest of n numbers; that of no number and NaN is whatever */
INLINE float most_float(const float *x, long n) {
    lanes found = all(-INFINITY);
    EACH(i, n,
        lanes own = filled(get_floats(x + i, left), left, -INFINITY);
        found = larger(own, found);
)
    return most_of(found);
}

/* Take the scores of n more keys into a row's softmax: probabilities relative to the largest score
   so far, zeros up to `wide`; its earlier sums shrink to match. */
static void take_scores(element *p, const float *s, long n, long wide, float c, float *top,
                        float *sum, float *o, long E) {
    float before = *top, now = most_float(s, n) * c;
    if (now < before) now = before;
    lanes sums = {0};
    long whole = n / W * W;
    for (long u = 0; u < whole; u += W) {
        lanes own = power_of_two(get_floats(s + u, W) * c - now);
        sums += own;
        put(p + u, W, own);
    }
    for (long u = whole; u < wide; u += W) {
        lanes own = first(power_of_two(get_floats(s + u, W) * c - now), n - u);
        sums += own;
        put(p + u, W, own);
    }
    float less = before == now ? 1.0f : power_of_two(all(before - now))[0];
    *top = now;
    *sum = *sum * less + sum_of(sums);
    if (less != 1.0f)
        for (long e = 0; e < E; e += W) {
            lanes own = get_floats(o + e, W) * less;
            memcpy(o + e, &own, sizeof own);
        }
}

/* ---- forward ---------------------------------------------------------------------------------- */

/* Queries i to j - 1 of a document: o, and per row the largest score and the log2 of the sum. q and
   o begin at the block, kt and vp at the document. */
static void block_ahead(const Ahead *at, const Shape *is, const element *q, long q_stride,
                        const word *kt, const word *vp, element *o, float *tops, float *logs,
                        long i, long j) {
    long J = is->J, E = is->E, inner = E / PAIR, rows = (j - i) * J;
    pack_rows((element *)at->q, q, q_stride, j - i, J * E);
    for (long r = 0; r < rows; r++) at->tops[r] = -INFINITY, at->sums[r] = 0;
    memset(at->o, 0, rows * E * sizeof *at->o);
    for (long from = 0; from < j; from += KEYS) {
        long n = least(KEYS, j - from);
        for (long u = from; u < from + n; u += PANEL)
            for (long r = 0; r < rows; r += DEEP) {
                long m = least(DEEP, rows - r), seen = i + (r + m - 1) / J + 1 - u;
                if (seen > 0)
                    one_tile(m, least(seen, PANEL), at->q + r * inner, inner, 1, kt + u * inner,
                             PANEL, inner, at->s + r * KEYS + u - from, KEYS, 0);
            }
        for (long r = 0; r < rows; r++) {
            long strip_end = least(rows, r / DEEP * DEEP + DEEP);
            long seen = least(n, i + r / J + 1 - from);
            long wide = least(n, i + (strip_end - 1) / J + 1 - from);
            wide = (wide + W - 1) / W * W;
            if (seen > 0)
                take_scores(at->p + r * KEYS, at->s + r * KEYS, seen, wide, is->c, at->tops + r,
                            at->sums + r, at->o + r * E, E);
            else if (wide > 0)
                memset(at->p + r * KEYS, 0, wide * sizeof *at->p);
        }
        for (long u = 0; u < n; u += VALUES)
            for (long r = 0; r < rows; r += DEEP) {
                long m = least(DEEP, rows - r);
                long seen = least(least(n - u, VALUES), i + (r + m - 1) / J + 1 - from - u);
                if (seen > 0)
                    strip(m, E, (word *)at->p + (r * KEYS + u) / PAIR, KEYS / PAIR, 1,
                          vp + (from + u) / PAIR * E, E, (seen + PAIR - 1) / PAIR, at->o + r * E,
                          E, 1);
            }
    }
    for (long r = 0; r < rows; r++) {
        float share = 1.0f / at->sums[r];
        element *to = o + (r / J * is->H + r % J) * E;
        for (long e = 0; e < E; e += W) put(to + e, W, get_floats(at->o + r * E + e, W) * share);
        tops[r] = at->tops[r];
        logs[r] = log2f(at->sums[r]);
    }
}

/* ---- backward --------------------------------------------------------------------------------- */

typedef struct {
    word *kt, *vt, *kp, *q, *go, *qp, *gop, *p, *ds;
    element *ds_rows;
    float *dk, *dv, *dq, *s, *dp, *inner;
} Back;

static long lay_back(Back *to, float *room, long longest, long rows, long E) {
    long used = 0, padded = (longest + PANEL - 1) / PANEL * PANEL, words = E / PAIR;
    long even = rows + rows % 2, paired = even / PAIR; /* rows are written two at a time */
    long kt = take(&used, padded * words), vt = take(&used, padded * words);
    long kp = take(&used, padded * words), q = take(&used, rows * words);
    long go = take(&used, rows * words), qp = take(&used, paired * E);
    long gop = take(&used, paired * E), p = take(&used, paired * STEP);
    long ds = take(&used, paired * STEP), ds_rows = take(&used, even * STEP / PAIR);
    long dk = take(&used, padded * E), dv = take(&used, padded * E), dq = take(&used, rows * E);
    long s = take(&used, DEEP * PANEL), dp = take(&used, DEEP * PANEL), inner = take(&used, rows);
    word *w = (word *)room;
    if (to)
        *to = (Back){w + kt, w + vt, w + kp, w + q, w + go, w + qp, w + gop, w + p, w + ds,
                     PAIR > 1 ? (element *)(room + ds_rows) : (element *)(room + ds),
                     room + dk, room + dv, room + dq, room + s, room + dp, room + inner};
    return used;
}

/* p and ds = p (dp - inner) of two rows, whose tiles of PANEL scores and dp lie at s and dp;
   they see the first `seen` keys. The second row may be missing. */
INLINE void pair_of_rows(int masked, word *p, word *ds, element *ds_rows, const float *s,
                         const float *dp, const float *tops, const float *logs,
                         const float *inner, const long *seen, float c) {
    for (long u = 0; u < PANEL; u += W) {
        lanes ps[2], dss[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            lanes x = get_floats(s + i * PANEL + u, W) * c - tops[i] - logs[i];
            ps[i] = power_of_two(x);
            dss[i] = ps[i] * (get_floats(dp + i * PANEL + u, W) - inner[i]);
            if (masked) ps[i] = first(ps[i], seen[i] - u), dss[i] = first(dss[i], seen[i] - u);
        }
        put_rows(p + u, STEP, ps[0], ps[1]);
        put_rows(ds + u, STEP, dss[0], dss[1]);
        if (PAIR > 1) {
            put(ds_rows + u, W, dss[0]);
            put(ds_rows + STEP + u, W, dss[1]);
        }
    }
}

/* p and ds of m rows from row r of the block on, for a panel of keys from u on */
static void scores_back(const Back *at, const Shape *is, const float *tops, const float *logs, long m,
                        long r, long i, long u, long column) {
    long J = is->J, inner = is->E / PAIR, last = i + (r + m - 1) / J + 1 - u;
    word *p = at->p + r / PAIR * STEP + column, *ds = at->ds + r / PAIR * STEP + column;
    if (last <= 0) {
        for (long a = 0; a < (m + PAIR - 1) / PAIR; a++) {
            memset(p + a * STEP, 0, PANEL * sizeof *p);
            memset(ds + a * STEP, 0, PANEL * sizeof *ds);
        }
        return;
    }
    long n = least(last, PANEL);
    one_tile(m, n, at->q + r * inner, inner, 1, at->kt + u * inner, PANEL, inner, at->s, PANEL, 0);
    one_tile(m, n, at->go + r * inner, inner, 1, at->vt + u * inner, PANEL, inner, at->dp, PANEL, 0);
    int masked = i + r / J + 1 - u < PANEL || m % 2;
    for (long a = 0; a < m; a += 2) {
        long seen[2] = {i + (r + a) / J + 1 - u, a + 1 < m ? i + (r + a + 1) / J + 1 - u : 0};
        long other = a + 1 < m; /* where the second row is missing the first stands in, unseen */
        float top[2] = {tops[r + a], tops[r + a + other]};
        float log[2] = {logs[r + a], logs[r + a + other]};
        float product[2] = {at->inner[r + a], at->inner[r + a + other]};
        word *to = p + a / PAIR * STEP, *dto = ds + a / PAIR * STEP;
        element *rows = at->ds_rows + (r + a) * STEP + column;
        const float *s = at->s + a * PANEL, *dp = at->dp + a * PANEL;
        if (masked)
            pair_of_rows(1, to, dto, rows, s, dp, top, log, product, seen, is->c);
        else
            pair_of_rows(0, to, dto, rows, s, dp, top, log, product, seen, is->c);
    }
}

/* Queries i to j - 1 of a document: dq, and what they add to its dk and dv. */
static void block_back(const Back *at, const Shape *is, const element *q, long q_stride,
                       const element *o, const element *go, long go_stride, const float *tops,
                       const float *logs, element *dq, long dq_stride, float scale, long i, long j) {
    long J = is->J, E = is->E, rows = (j - i) * J, paired = (rows + PAIR - 1) / PAIR;
    pack_rows((element *)at->q, q, q_stride, j - i, J * E);
    pack_rows((element *)at->go, go, go_stride, j - i, J * E);
    pack_along(at->qp, (element *)at->q, E, rows, E);
    pack_along(at->gop, (element *)at->go, E, rows, E);
    for (long r = 0; r < rows; r++) {
        const element *own = o + (r / J * is->H + r % J) * E, *g = (element *)at->go + r * E;
        lanes sums = {0};
        for (long e = 0; e < E; e += W) sums += get(own + e, W) * get(g + e, W);
        at->inner[r] = sum_of(sums);
    }
    for (long from = 0; from < j; from += STEP) {
        long n = least(STEP, j - from);
        for (long u = 0; u < n; u += PANEL)
            for (long r = 0; r < rows; r += DEEP)
                scores_back(at, is, tops, logs, least(DEEP, rows - r), r, i, from + u, u);
        for (long r = 0; r < rows; r += DEEP) {
            long m = least(DEEP, rows - r), seen = least(n, i + (r + m - 1) / J + 1 - from);
            if (seen > 0 || from == 0)
                strip(m, E, (word *)at->ds_rows + r * STEP / PAIR, STEP / PAIR, 1,
                      at->kp + from / PAIR * E, E, (seen + PAIR - 1) / PAIR, at->dq + r * E, E,
                      from > 0);
        }
        for (long u = 0; u < n; u += DEEP) {
            long m = least(DEEP, n - u), skip = most_long(0, (from + u - i) * J) / PAIR;
            const word *p = at->p + skip * STEP + u, *ds = at->ds + skip * STEP + u;
            float *dv = at->dv + (from + u) * E, *dk = at->dk + (from + u) * E;
            strip(m, E, p, 1, STEP, at->gop + skip * E, E, paired - skip, dv, E, 1);
            strip(m, E, ds, 1, STEP, at->qp + skip * E, E, paired - skip, dk, E, 1);
        }
    }
    for (long r = 0; r < rows; r++)
        for (long e = 0; e < E; e += W)
            put(dq + r / J * dq_stride + r % J * E + e, W, get_floats(at->dq + r * E + e, W) * scale);
}

/* ---- whole packs ------------------------------------------------------------------------------ */

/* Floats of room: forward for `slots` tokens packed, backward for the longest document. */
API long attention_room(long slots, long longest, long rows, long E, long G, int workers) {
    if (slots) return 2 * G * slots * E / PAIR + workers * lay_ahead(0, 0, rows, E);
    return workers * lay_back(0, 0, longest, rows, E);
}

/* workers take tasks from `next`, so that results and their place do not depend on who takes them */
#define WORKERS _Pragma("omp parallel for num_threads(workers) if (workers > 1) schedule(static, 1)")
#define TASKS(task, count)                                                                       \
    for (long task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < (count);)

/* documents: first token, end, first slot; blocks: document, first query. Slots of a document are
   its tokens rounded up to PANEL. tops and logs are (G, T J). */
API void attention(const element *q, long q_stride, const element *k, long k_stride,
                   const element *v, long v_stride, element *o, float *tops, float *logs,
                   float *room, const int64_t *documents, long num_documents, const int64_t *blocks,
                   long num_blocks, long T, long slots, long queries, long G, long J, long E,
                   int workers) {
    Shape is = {1.44269504f / sqrtf((float)E), J, E, G * J, queries};
    word *kt = (word *)room, *vp = kt + G * slots * E / PAIR;
    float *own = room + 2 * G * slots * E / PAIR;
    long each = lay_ahead(0, 0, queries * J, E), next = 0;
    WORKERS
    for (int worker = 0; worker < workers; worker++)
        TASKS(task, num_documents * G) {
            const int64_t *is_at = documents + task / G * 3;
            long a = is_at[0], L = is_at[1] - a, g = task % G, at = (g * slots + is_at[2]) * E / PAIR;
            pack_across(kt + at, k + a * k_stride + g * E, k_stride, L, E);
            pack_along(vp + at, v + a * v_stride + g * E, v_stride, L, E);
        }
    next = 0;
    WORKERS
    for (int worker = 0; worker < workers; worker++) {
        Ahead at;
        lay_ahead(&at, own + worker * each, queries * J, E);
        TASKS(task, num_blocks * G) {
            long g = task / num_blocks, block = num_blocks - 1 - task % num_blocks;
            const int64_t *document = documents + blocks[block * 2] * 3;
            long a = document[0], i = blocks[block * 2 + 1], t = a + i;
            long j = least(i + queries, document[1] - a), packed = (g * slots + document[2]) * E / PAIR;
            block_ahead(&at, &is, q + t * q_stride + g * J * E, q_stride, kt + packed, vp + packed,
                        o + (t * G + g) * J * E, tops + (g * T + t) * J, logs + (g * T + t) * J, i, j);
        }
    }
}

/* Gradients of q, k and v, whose rows are dq_stride and so on apart. */
API void attention_back(const element *q, long q_stride, const element *k, long k_stride,
                        const element *v, long v_stride, const element *o, const element *go,
                        long go_stride, const float *tops, const float *logs, element *dq,
                        element *dk, element *dv, long d_stride, float *room,
                        const int64_t *documents, long num_documents, long T, long longest,
                        long queries, long G, long J, long E, int workers) {
    Shape is = {1.44269504f / sqrtf((float)E), J, E, G * J, queries};
    float scale = 1.0f / sqrtf((float)E);
    long each = lay_back(0, 0, longest, queries * J, E), next = 0;
    WORKERS
    for (int worker = 0; worker < workers; worker++) {
        Back at;
        lay_back(&at, room + worker * each, longest, queries * J, E);
        TASKS(task, num_documents * G) {
            long g = task % G, a = documents[task / G * 3], L = documents[task / G * 3 + 1] - a;
            const element *ks = k + a * k_stride + g * E, *vs = v + a * v_stride + g * E;
            pack_across(at.kt, ks, k_stride, L, E);
            pack_across(at.vt, vs, v_stride, L, E);
            pack_along(at.kp, ks, k_stride, L, E);
            memset(at.dk, 0, L * E * sizeof *at.dk);
            memset(at.dv, 0, L * E * sizeof *at.dv);
            for (long i = 0; i < L; i += queries) {
                long t = a + i, head = (t * G + g) * J, row = (g * T + t) * J;
                block_back(&at, &is, q + t * q_stride + g * J * E, q_stride, o + head * E,
                           go + t * go_stride + g * J * E, go_stride, tops + row, logs + row,
                           dq + t * d_stride + g * J * E, d_stride, scale, i,
                           least(i + queries, L));
            }
            for (long u = 0; u < L; u++)
                for (long e = 0; e < E; e += W) {
                    long to = (a + u) * d_stride + g * E + e;
                    put(dk + to, W, get_floats(at.dk + u * E + e, W) * scale);
                    put(dv + to, W, get_floats(at.dv + u * E + e, W));
                }
        }
    }
}
#endif
