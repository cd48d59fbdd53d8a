// docker buildx bake [gpu | cpu]. Set variables in the environment, for example:
//   IMAGE=user/worker TAG=0.2.0 REVISION=$(git rev-parse HEAD) docker buildx bake --push
// With MODEL_NAME the GPU image contains this model, downloaded with MODEL_REVISION and HF_TOKEN.
variable "IMAGE" { default = "runpod-vllm-worker" }
variable "TAG" { default = "dev" }
variable "VLLM_REPOSITORY" { default = "vllm/vllm-openai" }
variable "VLLM_TAG" { default = "v0.32.0" }
variable "MODEL_NAME" { default = "" }
variable "MODEL_REVISION" { default = "" }
variable "REVISION" { default = "unknown" }
variable "SOURCE" { default = "https://github.com/OWNER/runpod-vllm-worker" }

group "default" { targets = ["gpu"] }

target "gpu" {
  target    = "gpu"
  platforms = ["linux/amd64"]
  tags      = ["${IMAGE}:${TAG}"]
  args = {
    VLLM_REPOSITORY = VLLM_REPOSITORY
    VLLM_TAG        = VLLM_TAG
    MODEL_NAME      = MODEL_NAME
    MODEL_REVISION  = MODEL_REVISION
    VERSION         = TAG
    REVISION        = REVISION
    SOURCE          = SOURCE
  }
  // The token for a gated model. No layer contains it. Without `env=`, a build without the variable fails.
  secret = ["type=env,id=HF_TOKEN,env=HF_TOKEN"]
}

target "cpu" {
  target    = "cpu"
  platforms = ["linux/amd64"]
  tags      = ["${IMAGE}:${TAG}-cpu"]
  args      = { VERSION = TAG }
}
