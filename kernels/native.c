/* What stands between the matrix products of a CPU step, each in one pass: see native.py.

   Arithmetic and memory are lanes.h's.
   Letters as in the Python files: T tokens, D model width, F feed-forward width, H heads of width
   E, G key heads, J queries that share one, Q a block of queries, U its keys, S rows of V logits. */

#include "lanes.h"

enum { KEPT = 4096, ROUNDS = 7 /* of Philox, as dropout.py */ };

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
