// decode in float32, one row of the output after the other. Strides are in elements, and 64 bits wide.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// q [b, s, h, d], kv_cache [pages, page_size, d], block_table [b, max pages], cache_seqlens [b]: any strides.
// out [b, s, h, v] and lse [b, h, s]: dense. Every element of both is written.
extern "C" void decode(
    const float *q, const int64_t *q_stride, const float *kv, const int64_t *kv_stride,
    const int32_t *table, const int64_t *table_stride, const int32_t *seqlens, int64_t seqlens_stride,
    float *out, float *lse,
    int64_t b, int64_t s, int64_t h, int64_t d, int64_t v, int64_t page_size, float scale, bool causal)
{
    std::vector<float> p;
    for (int64_t i = 0; i < b; i++)
    for (int64_t j = 0; j < s; j++)
    for (int64_t k = 0; k < h; k++) {
        const int64_t length = seqlens[i * seqlens_stride];
        const int64_t keys = std::max<int64_t>(causal ? length - s + j + 1 : length, 0);
        const float *query = q + i * q_stride[0] + j * q_stride[1] + k * q_stride[2];
        auto row = [&](int64_t t) {
            const int64_t page = table[i * table_stride[0] + t / page_size * table_stride[1]];
            return kv + page * kv_stride[0] + t % page_size * kv_stride[1];
        };

        float m = -std::numeric_limits<float>::infinity(), sum = 0;
        p.resize(keys);
        for (int64_t t = 0; t < keys; t++) {
            float x = 0;
            for (int64_t c = 0; c < d; c++) x += query[c * q_stride[3]] * row(t)[c * kv_stride[2]];
            p[t] = x * scale;
            m = std::max(m, p[t]);
        }
        for (float &x : p) sum += x = std::exp(x - m);

        float *o = out + ((i * s + j) * h + k) * v;
        std::fill(o, o + v, 0.0f);  // what a row without keys gives
        for (int64_t t = 0; t < keys; t++)
            for (int64_t c = 0; c < v; c++) o[c] += p[t] * row(t)[c * kv_stride[2]];
        for (int64_t c = 0; c < v && keys > 0; c++) o[c] /= sum;
        lse[(i * h + k) * s + j] = m + std::log(sum);  // -inf without keys
    }
}
