// Five operations in float32, judged by mla-spec without a line of Python: through a pipe, or by files.
//
//     g++ -std=c++17 -O2 -o client examples/exchange/client.cpp
//     mla-spec check --command ./client
//
//     mla-spec export calls --subject 'command:./client'
//     ./client calls                      (here or on any other machine)
//     mla-spec judge calls

#include <algorithm>
#include <cmath>
#include <limits>

#include "exchange.hpp"

using exchange::Message;
using exchange::Tensor;
using exchange::zeros;

namespace {

constexpr float NONE = -std::numeric_limits<float>::infinity();  // the LSE of a row that sees no key

// softmax(scale · q · keysᵀ) · values of one query; key(t) and value(t) point to rows.
template <class Key, class Value>
void attend(const float *q, int64_t d, int64_t keys, Key key, Value value, int64_t v, float scale, float *out, float *lse) {
    std::vector<float> p(std::max<int64_t>(keys, 0));
    float m = NONE, sum = 0;
    for (int64_t t = 0; t < keys; t++) {
        float x = 0;
        for (int64_t c = 0; c < d; c++) x += q[c] * key(t)[c];
        p[t] = x * scale;
        m = std::max(m, p[t]);
    }
    for (float &x : p) sum += x = std::exp(x - m);
    for (int64_t t = 0; t < keys; t++)
        for (int64_t c = 0; c < v; c++) out[c] += p[t] * value(t)[c];
    for (int64_t c = 0; c < v && keys > 0; c++) out[c] /= sum;
    *lse = m + std::log(sum);  // -inf without keys
}

Message decode(const Message &call) {
    const Tensor &q = call["q"], &cache = call["kv_cache"], &table = call["block_table"], &seqlens = call["cache_seqlens"];
    const int64_t b = q.shape[0], s = q.shape[1], h = q.shape[2], d = q.shape[3], page_size = cache.shape[1];
    const int64_t v = call.number("head_dim_v"), width = table.shape[1];
    const float scale = call.number("softmax_scale");
    Tensor out = zeros<float>("F32", {b, s, h, v}), lse = zeros<float>("F32", {b, h, s});
    for (int64_t i = 0; i < b; i++) {
        const int64_t length = seqlens.as<int32_t>()[i];
        auto row = [&](int64_t t) {
            const int64_t page = table.as<int32_t>()[i * width + t / page_size];
            return cache.as<float>() + (page * page_size + t % page_size) * d;
        };
        for (int64_t j = 0; j < s; j++)
            for (int64_t k = 0; k < h; k++) {
                const int64_t keys = call.flag("causal") ? length - s + j + 1 : length, at = (i * s + j) * h + k;
                float *l = lse.as<float>() + (i * h + k) * s + j;
                attend(q.as<float>() + at * d, d, keys, row, row, v, scale, out.as<float>() + at * v, l);
            }
    }
    return {{{"out", out}, {"lse", lse}}, {}};
}

Message prefill(const Message &call) {
    const Tensor &q = call["q"], &k = call["k"], &v = call["v"];
    const int64_t tokens = q.shape[0], h = q.shape[1], d = q.shape[2], dv = v.shape[2];
    const int32_t *first_q = call["cu_seqlens_q"].as<int32_t>(), *first_k = call["cu_seqlens_k"].as<int32_t>();
    const float scale = call.number("softmax_scale");
    Tensor out = zeros<float>("F32", {tokens, h, dv}), lse = zeros<float>("F32", {h, tokens});
    for (int64_t i = 0; i + 1 < call["cu_seqlens_q"].shape[0]; i++) {
        const int64_t s = first_q[i + 1] - first_q[i], t = first_k[i + 1] - first_k[i];
        for (int64_t j = 0; j < s; j++)
            for (int64_t head = 0; head < h; head++) {
                auto key = [&](int64_t n) { return k.as<float>() + ((first_k[i] + n) * h + head) * d; };
                auto value = [&](int64_t n) { return v.as<float>() + ((first_k[i] + n) * h + head) * dv; };
                const int64_t keys = call.flag("causal") ? t - s + j + 1 : t, token = first_q[i] + j;
                const int64_t at = token * h + head;
                float *l = lse.as<float>() + head * tokens + token;
                attend(q.as<float>() + at * d, d, keys, key, value, dv, scale, out.as<float>() + at * dv, l);
            }
    }
    return {{{"out", out}, {"lse", lse}}, {}};
}

Message merge(const Message &call) {
    const Tensor &outs = call["outs"], &lses = call["lses"];
    std::vector<int64_t> shape(outs.shape.begin() + 1, outs.shape.end());  // [(b,) s, h, v]
    const int64_t parts = outs.shape[0], n = shape.size();
    const int64_t b = n == 4 ? shape[0] : 1, s = shape[n - 3], h = shape[n - 2], v = shape[n - 1], rows = b * s * h;
    Tensor out = zeros<float>("F32", shape), lse = zeros<float>("F32", {lses.shape.begin() + 1, lses.shape.end()});
    for (int64_t i = 0; i < b; i++)
        for (int64_t j = 0; j < s; j++)
            for (int64_t k = 0; k < h; k++) {
                const int64_t in_out = (i * s + j) * h + k, in_lse = (i * h + k) * s + j;
                float m = NONE, sum = 0;
                for (int64_t p = 0; p < parts; p++) m = std::max(m, lses.as<float>()[p * rows + in_lse]);
                for (int64_t p = 0; p < parts && m > NONE; p++) {
                    const float share = std::exp(lses.as<float>()[p * rows + in_lse] - m);
                    sum += share;
                    const float *part = outs.as<float>() + (p * rows + in_out) * v;
                    for (int64_t c = 0; c < v; c++) out.as<float>()[in_out * v + c] += share == 0 ? 0 : share * part[c];
                }
                for (int64_t c = 0; c < v && m > NONE; c++) out.as<float>()[in_out * v + c] /= sum;
                lse.as<float>()[in_lse] = m + std::log(sum);
            }
    return {{{"out", out}, {"lse", lse}}, {}};
}

Message rope(const Message &call) {
    const Tensor &x = call["x"], &positions = call["positions"];
    const int64_t r = x.shape.back(), tokens = positions.data.size() / sizeof(int64_t);
    const int64_t rows = x.data.size() / sizeof(float) / r;
    const double theta = call.number("rope.theta");
    const bool interleaved = call.flag("rope.interleaved");
    Tensor out = x;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < r / 2; i++) {
            const double position = positions.as<int64_t>()[row / (rows / tokens)];
            const double angle = position * std::pow(theta, -2.0 * i / r);
            const float cos = std::cos(angle), sin = std::sin(angle);
            const int64_t first = row * r + (interleaved ? 2 * i : i), second = first + (interleaved ? 1 : r / 2);
            const float a = x.as<float>()[first], c = x.as<float>()[second];
            out.as<float>()[first] = a * cos - c * sin;
            out.as<float>()[second] = c * cos + a * sin;
        }
    return {{{"out", out}}, {}};
}

Message write_cache(const Message &call) {
    const Tensor &latent = call["latent"], &k_pe = call["k_pe"], &slots = call["slot_mapping"];
    const int64_t c = latent.shape[1], r = k_pe.shape[1];
    Tensor cache = call["kv_cache"];
    for (int64_t i = 0; i < slots.shape[0]; i++) {
        const int64_t slot = slots.as<int64_t>()[i];
        if (slot < 0) continue;
        float *row = cache.as<float>() + slot * (c + r);
        std::copy_n(latent.as<float>() + i * c, c, row);
        std::copy_n(k_pe.as<float>() + i * r, r, row + c);
    }
    return {{{"kv_cache", cache}}, {}};
}

Message answer(const Message &call) {
    const std::string &operation = call.text("operation");
    if (operation == "describe")
        return {{},
                {{"name", "cpp-client"},
                 {"operations", "rope prefill decode merge write_cache"},
                 {"supports", R"({"dtypes": ["float32"], "yarn": false, "longrope": false})"}}};
    if (operation == "decode") return decode(call);
    if (operation == "prefill") return prefill(call);
    if (operation == "merge") return merge(call);
    if (operation == "rope") return rope(call);
    if (operation == "write_cache") return write_cache(call);
    return {{}, {{"unsupported", "this client has no " + operation}}};
}

}  // namespace

int main(int argc, char **argv) {
    return argc > 1 ? exchange::answer_folder(argv[1], answer) : exchange::answer_pipe(answer);
}
