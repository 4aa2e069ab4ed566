/* The smallest client: merge in float32, without a JSON parser. It finds what it needs in the header as text.

       cc -std=c99 -O2 -o client examples/exchange/client.c -lm
       mla-spec check --command ./client
*/

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Elements and shape of the tensor called `name`; the axes after its shape are 1. */
static float *tensor(const char *header, char *contents, const char *name, int64_t shape[6], int *axes)
{
    char key[32];
    snprintf(key, sizeof key, "\"%s\":{", name);
    const char *entry = strstr(header, key);
    char *at = strstr(entry, "\"shape\":[") + 9;
    *axes = 0;
    while (*at != ']') {
        shape[(*axes)++] = strtoll(at, &at, 10);
        if (*at == ',') at++;
    }
    return (float *)(contents + strtoll(strstr(entry, "\"data_offsets\":[") + 16, NULL, 10));
}

/* Writes a message: a header, padded with spaces, and one or two arrays. */
static void put(char *header, const float *a, int64_t count_a, const float *b, int64_t count_b)
{
    uint64_t size = (strlen(header) + 7) / 8 * 8, whole = 8 + size + 4 * (count_a + count_b);
    fwrite(&whole, 8, 1, stdout);
    fwrite(&size, 8, 1, stdout);
    fprintf(stdout, "%-*s", (int)size, header);
    fwrite(a, 4, count_a, stdout);
    fwrite(b, 4, count_b, stdout);
    fflush(stdout);
}

static void merge(const char *header, char *contents)
{
    int64_t n[6], unused[6];
    int axes, lse_axes;
    const float *outs = tensor(header, contents, "outs", n, &axes);       /* [parts, (b,) s, h, v] */
    const float *lses = tensor(header, contents, "lses", unused, &lse_axes); /* [parts, (b,) h, s] */
    const int64_t parts = n[0], b = axes == 5 ? n[1] : 1, s = n[axes - 3], h = n[axes - 2], v = n[axes - 1];
    const int64_t rows = b * s * h;
    float *out = calloc(rows * v + 1, 4), *lse = calloc(rows + 1, 4);

    for (int64_t i = 0; i < b; i++)
    for (int64_t j = 0; j < s; j++)
    for (int64_t k = 0; k < h; k++) {
        const int64_t row = (i * s + j) * h + k, in_lse = (i * h + k) * s + j;
        float m = -INFINITY, sum = 0;
        for (int64_t p = 0; p < parts; p++) m = fmaxf(m, lses[p * rows + in_lse]);
        for (int64_t p = 0; p < parts && m > -INFINITY; p++) {
            const float share = expf(lses[p * rows + in_lse] - m);
            if (share == 0) continue; /* the output of a part without keys may be anything */
            sum += share;
            for (int64_t c = 0; c < v; c++) out[row * v + c] += share * outs[(p * rows + row) * v + c];
        }
        for (int64_t c = 0; c < v && m > -INFINITY; c++) out[row * v + c] /= sum;
        lse[in_lse] = m > -INFINITY ? m + logf(sum) : -INFINITY;
    }

    char text[512], batch[32] = "";
    if (axes == 5) snprintf(batch, sizeof batch, "%lld,", (long long)b);
    snprintf(text, sizeof text,
             "{\"out\":{\"dtype\":\"F32\",\"shape\":[%s%lld,%lld,%lld],\"data_offsets\":[0,%lld]},"
             "\"lse\":{\"dtype\":\"F32\",\"shape\":[%s%lld,%lld],\"data_offsets\":[%lld,%lld]}}",
             batch, (long long)s, (long long)h, (long long)v, (long long)(4 * rows * v),
             batch, (long long)h, (long long)s, (long long)(4 * rows * v), (long long)(4 * rows * (v + 1)));
    put(text, out, rows * v, lse, rows);
    free(out);
    free(lse);
}

int main(void)
{
    uint64_t whole, size;
    while (fread(&whole, 8, 1, stdin) == 1) {
        char *message = malloc(whole + 1);
        if (fread(message, 1, whole, stdin) != whole) return 1;
        memcpy(&size, message, 8);
        char *header = calloc(size + 1, 1), *contents = message + 8 + size;
        memcpy(header, message + 8, size);
        if (strstr(header, "\"operation\":\"describe\""))
            put("{\"__metadata__\":{\"name\":\"c-client\",\"operations\":\"merge\","
                "\"supports\":\"{\\\"dtypes\\\": [\\\"float32\\\"]}\"}}", NULL, 0, NULL, 0);
        else if (strstr(header, "\"operation\":\"merge\""))
            merge(header, contents);
        else
            put("{\"__metadata__\":{\"unsupported\":\"this client has merge only\"}}", NULL, 0, NULL, 0);
        free(header);
        free(message);
    }
    return 0;
}
