// Calls of mla-spec, as docs/exchange.md describes them: read, answered and written without any library.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace exchange {

// The elements lie dense, last index fastest.
struct Tensor {
    std::string dtype;
    std::vector<int64_t> shape;
    std::vector<char> data;

    template <class T> const T *as() const { return reinterpret_cast<const T *>(data.data()); }
    template <class T> T *as() { return reinterpret_cast<T *>(data.data()); }
};

template <class T> Tensor zeros(const char *dtype, std::vector<int64_t> shape) {
    int64_t count = 1;
    for (int64_t n : shape) count *= n;
    return {dtype, std::move(shape), std::vector<char>(count * sizeof(T))};
}

// A call or an answer: tensors and texts by name.
struct Message {
    std::map<std::string, Tensor> tensors;
    std::map<std::string, std::string> texts;

    const Tensor &operator[](const std::string &name) const { return tensors.at(name); }
    const std::string &text(const std::string &name) const { return texts.at(name); }
    double number(const std::string &name) const { return std::strtod(text(name).c_str(), nullptr); }
    bool flag(const std::string &name) const { return text(name) == "true"; }
};

// Of JSON what a header needs: objects, lists of whole numbers, strings.
class Header {
public:
    explicit Header(const std::string &text) : at(text.data()), end(at + text.size()) {}

    Message message(const char *contents) {
        Message made;
        object([&](const std::string &name) {
            if (name == "__metadata__") {
                object([&](const std::string &key) { made.texts[key] = string(); });
                return;
            }
            Tensor x;
            std::vector<int64_t> range;
            object([&](const std::string &key) {
                if (key == "dtype") x.dtype = string();
                else (key == "shape" ? x.shape : range) = numbers();
            });
            x.data.assign(contents + range.at(0), contents + range.at(1));
            made.tensors[name] = std::move(x);
        });
        return made;
    }

private:
    const char *at, *end;

    char next() {
        while (at < end && std::strchr(" \t\r\n", *at)) at++;
        if (at == end) throw std::runtime_error("the header ends too early");
        return *at;
    }

    bool take(char c) { return next() == c ? (at++, true) : false; }

    void require(char c) {
        if (!take(c)) throw std::runtime_error(std::string("the header has no ") + c + " where one is due");
    }

    template <class F> void object(F entry) {
        require('{');
        while (!take('}')) {
            const std::string name = string();
            require(':');
            entry(name);
            take(',');
        }
    }

    std::vector<int64_t> numbers() {
        std::vector<int64_t> made;
        require('[');
        while (!take(']')) {
            next();
            char *after;
            made.push_back(std::strtoll(at, &after, 10));
            at = after;
            take(',');
        }
        return made;
    }

    std::string string() {
        std::string made;
        require('"');
        while (at < end && *at != '"') {
            if (*at == '\\') at++;  // of escapes, a call has \" and \\ alone
            made += *at++;
        }
        require('"');
        return made;
    }
};

inline Message decode(const std::string &bytes) {
    uint64_t size;
    std::memcpy(&size, bytes.data(), 8);
    return Header(bytes.substr(8, size)).message(bytes.data() + 8 + size);
}

inline std::string quoted(const std::string &text) {
    std::string made = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') made += '\\';
        made += c;
    }
    return made + '"';
}

inline std::string encode(const Message &message) {
    std::string header = "{\"__metadata__\":{", contents;
    for (auto &[key, text] : message.texts) {
        if (header.back() != '{') header += ',';
        header += quoted(key) + ':' + quoted(text);
    }
    header += '}';
    for (auto &[name, x] : message.tensors) {
        std::string shape;
        for (int64_t n : x.shape) shape += (shape.empty() ? "" : ",") + std::to_string(n);
        const size_t start = contents.size();
        contents.append(x.data.data(), x.data.size());
        header += ',' + quoted(name) + ":{\"dtype\":" + quoted(x.dtype) + ",\"shape\":[" + shape + "],\"data_offsets\":[" +
                  std::to_string(start) + ',' + std::to_string(contents.size()) + "]}";
    }
    header += '}';
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const uint64_t size = header.size();
    return std::string(reinterpret_cast<const char *>(&size), 8) + header + contents;
}

// Answers every call that arrives on the standard input, until it ends.
template <class F> int answer_pipe(F answer) {
    uint64_t size;
    while (std::fread(&size, 8, 1, stdin) == 1) {
        std::string bytes(size, '\0');
        if (std::fread(bytes.data(), 1, size, stdin) != size) return 1;
        const std::string reply = encode(answer(decode(bytes)));
        size = reply.size();
        std::fwrite(&size, 8, 1, stdout);
        std::fwrite(reply.data(), 1, size, stdout);
        std::fflush(stdout);
    }
    return 0;
}

// Answers every call of a folder that has no answer yet. A file appears whole: it is written under another name first.
template <class F> int answer_folder(const std::filesystem::path &folder, F answer) {
    for (auto &entry : std::filesystem::directory_iterator(folder / "calls")) {
        const auto path = folder / "answers" / entry.path().filename();
        if (entry.path().extension() != ".safetensors" || std::filesystem::exists(path)) continue;
        std::ifstream file(entry.path(), std::ios::binary);
        const std::string bytes(std::istreambuf_iterator<char>(file), {});
        auto temporary = path;
        temporary += ".tmp";
        std::ofstream(temporary, std::ios::binary) << encode(answer(decode(bytes)));
        std::filesystem::rename(temporary, path);
    }
    return 0;
}

}  // namespace exchange
