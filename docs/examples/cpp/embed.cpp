// Embeds prepared rows with a bundle's ONNX Runtime engine, from C++ and without Python.
//
//   embed BUNDLE MANIFEST_SHA256 image|text < rows > embeddings
//
// Rows are raw and in the machine's byte order: uint8 crops (side, side, 3), or float32 pixels (3, side, side) where the
// graph takes these; or int64 ids (context_length). Embeddings are raw float32 (d), of length 1. MANIFEST_SHA256 is the digest of the manifest that was verified when it was deployed
// (`uwm-deploy verify-signature`, then `sha256sum BUNDLE/manifest.json`); the manifest lists every other file with its own.
//
// Nothing is loaded before its digest was checked, and what is loaded are the bytes that were hashed. The engine must be one
// of the proven variant, and must answer the bundle's canaries like the edited model before it answers anything else.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else
#include "ort_abi.h"
#endif

#include "json.h"
#include "sha256.h"

namespace {

constexpr int kIntegrity = 5;  // the exit code of uwm-deploy for the same thing
constexpr double kRatioLimit = 0.5;
const std::string kVariant = "onnxruntime-fp32";

struct Integrity : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string read_checked(const std::string& path, const std::string& digest) {
  std::ifstream stream(path, std::ios::binary);
  std::string data((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (!stream.good() && !stream.eof()) throw Integrity(path + " cannot be read");
  if (sha256::hex(data) != digest) throw Integrity(path + " has changed: its digest is not the expected one");
  return data;
}

std::string plain_digest(const std::string& text) {
  const std::string prefix = "sha256:";
  return text.rfind(prefix, 0) == 0 ? text.substr(prefix.size()) : text;
}

class Bundle {
 public:
  Bundle(std::string folder, const std::string& digest)
      : folder_(std::move(folder)),
        manifest(JsonReader::parse(read_checked(folder_ + "/manifest.json", plain_digest(digest)))) {
    const auto& verdict = manifest.at("verdict");
    const auto& proven = verdict.at("proven").items;
    const bool is_proven = std::any_of(proven.begin(), proven.end(), [](const Json& v) { return v.text == kVariant; });
    if (verdict.at("result").text != "pass" || !is_proven) throw Integrity(kVariant + " is not proven");
  }

  std::string read(const std::string& name) const {
    for (const Json& file : manifest.at("files").items)
      if (file.at("path").text == name) return read_checked(folder_ + "/" + name, plain_digest(file.at("digest").text));
    throw Integrity("manifest.json does not list " + name);
  }

  const Json& engine(const std::string& tower) const {
    for (const Json& engine : manifest.at("engines").items)
      if (engine.at("variant").text == kVariant && engine.at("tower").text == tower) return engine;
    throw Integrity("the bundle has no " + kVariant + " engine of the " + tower + " tower");
  }

 private:
  std::string folder_;

 public:
  Json manifest;
};

const OrtApi& api() {
  static const OrtApi* const found = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (found == nullptr) throw std::runtime_error("the library is older than the headers");
  return *found;
}

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  throw std::runtime_error("ONNX Runtime: " + message);
}

void to_length_one(std::vector<float>& rows, int64_t width) {
  for (size_t row = 0; row < rows.size(); row += width) {
    double length = 0;
    for (int64_t i = 0; i < width; ++i) length += double{rows[row + i]} * rows[row + i];
    for (int64_t i = 0; i < width; ++i) rows[row + i] = static_cast<float>(rows[row + i] / std::sqrt(length));
  }
}

struct ElementType {
  ONNXTensorElementDataType code;
  size_t bytes;
};

ElementType type_of(const std::string& dtype) {
  if (dtype == "uint8") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, sizeof(uint8_t)};
  if (dtype == "float32") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, sizeof(float)};
  if (dtype == "int64") return {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, sizeof(int64_t)};
  throw std::runtime_error("the input is of another type: " + dtype);
}

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

class Engine {
 public:
  Engine(const Bundle& bundle, const std::string& tower) : about_(bundle.engine(tower)) {
    const Json& input = about_.at("inputs").items.at(0);
    type_ = type_of(input.at("dtype").text);
    for (const Json& size : input.at("shape").items)
      if (size.kind == Json::number) shape_.push_back(static_cast<int64_t>(size.value));
    // A graph for rows of any length takes whole rows, too.
    if (const auto lengths = input.members.find("lengths"); lengths != input.members.end())
      shape_.push_back(static_cast<int64_t>(lengths->second.at("longest").value));
    largest_ = static_cast<int64_t>(about_.at("profile").at("max").value);
    width_ = static_cast<int64_t>(about_.at("outputs").items.at(0).at("shape").items.at(1).value);
    if (const auto data = about_.members.find("external_data"); data != about_.members.end() && !data->second.text.empty())
      throw std::runtime_error("this example reads graphs of one file only");
    const std::string model = bundle.read("engines/" + kVariant + "/" + about_.at("file").text);
    OrtSessionOptions* made = nullptr;
    check(api().CreateSessionOptions(&made));
    const Owned<OrtSessionOptions> options(made, api().ReleaseSessionOptions);
    OrtEnv* env = nullptr;
    check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "uwm", &env));
    env_.reset(env);
    OrtSession* session = nullptr;
    check(api().CreateSessionFromArray(env_.get(), model.data(), model.size(), options.get(), &session));
    session_.reset(session);
    OrtMemoryInfo* memory = nullptr;
    check(api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    memory_.reset(memory);
  }

  size_t row_bytes() const {
    size_t count = type_.bytes;
    for (const int64_t size : shape_) count *= size;
    return count;
  }
  int64_t width() const { return width_; }

  // Embeddings of some rows, of length 1.
  std::vector<float> embed(std::string rows) const {
    if (rows.size() % row_bytes() != 0) throw std::runtime_error("the input is not a whole number of rows");
    std::vector<float> found;
    for (size_t at = 0; at < rows.size(); at += largest_ * row_bytes()) {
      const size_t bytes = std::min(rows.size() - at, largest_ * row_bytes());
      const std::vector<float> some = run(rows.data() + at, bytes);
      found.insert(found.end(), some.begin(), some.end());
    }
    return found;
  }

 private:
  std::vector<float> run(char* data, size_t bytes) const {
    std::vector<int64_t> shape{static_cast<int64_t>(bytes / row_bytes())};
    shape.insert(shape.end(), shape_.begin(), shape_.end());
    OrtValue* made = nullptr;
    check(api().CreateTensorWithDataAsOrtValue(memory_.get(), data, bytes, shape.data(), shape.size(), type_.code, &made));
    const Owned<OrtValue> input(made, api().ReleaseValue);
    const std::string input_name = about_.at("inputs").items.at(0).at("name").text;
    const std::string output_name = about_.at("outputs").items.at(0).at("name").text;
    const char *in = input_name.c_str(), *out = output_name.c_str();
    const OrtValue* const inputs[] = {input.get()};
    OrtValue* answer = nullptr;
    check(api().Run(session_.get(), nullptr, &in, inputs, 1, &out, 1, &answer));
    const Owned<OrtValue> output(answer, api().ReleaseValue);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api().GetTensorTypeAndShape(output.get(), &info));
    const Owned<OrtTensorTypeAndShapeInfo> owned(info, api().ReleaseTensorTypeAndShapeInfo);
    size_t count = 0;
    check(api().GetTensorShapeElementCount(info, &count));
    if (count != static_cast<size_t>(shape[0] * width_)) throw std::runtime_error("the output has another shape");
    void* values = nullptr;
    check(api().GetTensorMutableData(output.get(), &values));
    std::vector<float> rows(static_cast<float*>(values), static_cast<float*>(values) + count);
    to_length_one(rows, width_);
    return rows;
  }

  const Json& about_;
  ElementType type_ = type_of("float32");
  std::vector<int64_t> shape_;
  int64_t largest_ = 1, width_ = 0;
  Owned<OrtEnv> env_{nullptr, api().ReleaseEnv};
  Owned<OrtSession> session_{nullptr, api().ReleaseSession};
  Owned<OrtMemoryInfo> memory_{nullptr, api().ReleaseMemoryInfo};
};

// Bytes of one tensor of a safetensors file.
std::string tensor(const std::string& file, const std::string& name) {
  uint64_t header = 0;
  if (file.size() < sizeof header) throw Integrity("the canaries are too short");
  std::memcpy(&header, file.data(), sizeof header);
  if (header > file.size() - sizeof header) throw Integrity("the canaries are too short");
  const Json about = JsonReader::parse(file.substr(sizeof header, header));
  const auto& ends = about.at(name).at("data_offsets").items;
  const auto first = static_cast<uint64_t>(ends.at(0).value), last = static_cast<uint64_t>(ends.at(1).value);
  if (first > last || last > file.size() - sizeof header - header) throw Integrity("the canaries are too short");
  return file.substr(sizeof header + header + first, last - first);
}

// The worst canary's distance to the edited model over that to the original one.
double canary_ratio(const Bundle& bundle, const Engine& engine, const std::string& tower) {
  const std::string file = bundle.read("evidence/canaries-" + tower + ".safetensors");
  const std::vector<float> found = engine.embed(tensor(file, "inputs"));
  const auto distances = [&](const std::string& name) {
    const std::string bytes = tensor(file, name);
    if (bytes.size() != found.size() * sizeof(float)) throw Integrity("the canaries have another shape");
    std::vector<float> wanted(found.size());
    std::memcpy(wanted.data(), bytes.data(), bytes.size());
    to_length_one(wanted, engine.width());
    std::vector<double> rows(found.size() / engine.width());
    for (size_t i = 0; i < found.size(); ++i) rows[i / engine.width()] += std::pow(double{found[i]} - wanted[i], 2);
    return rows;
  };
  const auto edited = distances("edited"), original = distances("original");
  double worst = 0;
  for (size_t row = 0; row < edited.size(); ++row) {
    const double ratio = std::sqrt(edited[row] / original[row]);
    if (std::isnan(ratio)) return INFINITY;
    worst = std::max(worst, ratio);
  }
  return edited.empty() ? INFINITY : worst;
}

int run(int count, char** words) {
  if (count != 4 || (std::string(words[3]) != "image" && std::string(words[3]) != "text")) {
    std::cerr << "usage: embed BUNDLE MANIFEST_SHA256 image|text < rows > embeddings\n";
    return 2;
  }
  const std::string tower = words[3];
  const Bundle bundle(words[1], words[2]);
  const Engine engine(bundle, tower);
  const double ratio = canary_ratio(bundle, engine, tower);
  if (!(ratio <= kRatioLimit)) throw Integrity("what runs does not answer like the edited model");
  std::cerr << "ONNX Runtime " << OrtGetApiBase()->GetVersionString() << ", " << kVariant << ", canaries " << ratio << "\n";
  const std::string rows((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
  const std::vector<float> found = engine.embed(rows);
  std::cout.write(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(float));
  return std::cout.flush() ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run(count, words);
  } catch (const Integrity& error) {
    std::cerr << "error: " << error.what() << "\n";
    return kIntegrity;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
