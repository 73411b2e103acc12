//! Writing a neuron-major copy of a model: every `ffn_down` becomes `ffn_down_t`, one row per neuron.
//!
//! In a plain file quantisation blocks of `ffn_down` run across neurons, so that no neuron's column can be read alone.
//! The transposition keeps float values as they are and quantises others again.

use std::path::Path;

use pi_kernels::QuantType;

use crate::gguf::{GgmlType, GgufFile, GgufStream, GgufWriter, is_split_key};
use crate::model::hyperparameters::Hyperparameters;
use crate::model::sparsity::{DownPlan, SparsityPlan, transposed_type};
use crate::model::tensors::{FileDown, LayerTensors, ModelTensors};
use crate::model::transpose::Transposer;
use crate::model::{GateKind, ModelError, Sparsity};

/// A model that can be packed.
#[derive(Debug)]
pub struct Packer<'a> {
    file: &'a GgufFile,
    hyper: Hyperparameters,
    tensors: ModelTensors,
}

impl<'a> Packer<'a> {
    /// Checks that `file` is a model that gains by packing.
    ///
    /// # Errors
    /// It is no model that can be run, its gates never close, or it is packed already.
    pub fn new(file: &'a GgufFile) -> Result<Self, ModelError> {
        let hyper = Hyperparameters::read(file)?;
        let tensors = ModelTensors::find(file, &hyper)?;
        if hyper.gate != GateKind::Relu {
            return Err(ModelError::NothingToSkip {
                activation: hyper.gate.name(),
            });
        }
        if let Some(FileDown::NeuronMajor(down)) = tensors
            .layers
            .iter()
            .map(|layer| &layer.down)
            .find(|down| matches!(down, FileDown::NeuronMajor(_)))
        {
            return Err(ModelError::AlreadyPacked {
                name: down.info.name().to_owned(),
            });
        }
        Ok(Self {
            file,
            hyper,
            tensors,
        })
    }

    /// The model's numbers.
    pub fn hyperparameters(&self) -> &Hyperparameters {
        &self.hyper
    }

    /// The model's tensors.
    pub fn tensors(&self) -> &ModelTensors {
        &self.tensors
    }

    /// The types worth considering for the rows: one for files of floats, else those between 4 and 8 bits; only those
    /// whose blocks fit.
    pub fn choices(&self) -> Vec<QuantType> {
        let mut own = self
            .tensors
            .layers
            .iter()
            .map(|layer| layer.down.matrix().quant);
        let mut choices = vec![
            QuantType::Q8_0,
            QuantType::Q5_1,
            QuantType::Q5_0,
            QuantType::Q4_0,
        ];
        if own.all(|quant| !quant.is_quantised()) {
            choices = vec![self.tensors.layers[0].down.matrix().quant];
        }
        choices.retain(|quant| self.hyper.n_embd.is_multiple_of(quant.block_values()));
        choices
    }

    /// The type of all rows where none is asked for; none where layers differ.
    pub fn default_type(&self) -> Option<QuantType> {
        let mut types = self
            .tensors
            .layers
            .iter()
            .map(|layer| transposed_type(layer.down.matrix().quant));
        let first = types.next()?;
        types.all(|quant| quant == first).then_some(first)
    }

    /// How the packed model will run with rows of `down_type`.
    pub fn plan(&self, down_type: Option<QuantType>) -> SparsityPlan {
        let transposed = |layer: &LayerTensors| {
            let from = layer.down.matrix().quant;
            DownPlan::Transposed {
                from,
                to: down_type.unwrap_or_else(|| transposed_type(from)),
            }
        };
        SparsityPlan {
            mode: Sparsity::Exact,
            down: self.tensors.layers.iter().map(transposed).collect(),
            predicts: false,
            thresholds: None,
            hint: None,
        }
    }

    /// Begins the packed model, to be at `path` once it is whole: until then `path` stays as it was, and an output that
    /// is dropped leaves nothing.
    ///
    /// `down_type` overrides the type of all rows; by default each layer's is [`transposed_type`].
    ///
    /// # Errors
    /// Rows that do not divide into blocks of the type, or what the file system refuses.
    pub fn create(
        &self,
        path: &Path,
        down_type: Option<QuantType>,
    ) -> Result<PackedOutput<'_>, ModelError> {
        let mut header = GgufWriter::new();
        header.copy_metadata(self.file.metadata(), is_split_key)?;
        let downs = self.downs(down_type)?;
        for tensor in self.file.tensors() {
            match downs.iter().find(|down| down.plain_name == tensor.name()) {
                Some(down) => {
                    let shape = [self.hyper.n_embd, self.hyper.n_ff];
                    header.add_tensor(&down.packed_name, GgmlType::from(down.to), &shape)?;
                }
                None => header.add_tensor(tensor.name(), tensor.ggml_type(), tensor.shape())?,
            }
        }
        let stream = header.create(path)?;
        Ok(PackedOutput {
            packer: self,
            stream,
            downs,
        })
    }

    fn downs(&self, down_type: Option<QuantType>) -> Result<Vec<PackedDown>, ModelError> {
        let layers = self.tensors.layers.iter().enumerate();
        layers
            .map(|(layer, tensors)| {
                let plain = tensors.down.matrix();
                let to = down_type.unwrap_or_else(|| transposed_type(plain.quant));
                if !self.hyper.n_embd.is_multiple_of(to.block_values()) {
                    return Err(ModelError::PartialBlock {
                        n_values: self.hyper.n_embd,
                        quant: to.name(),
                        block_values: to.block_values(),
                    });
                }
                let plain_name = plain.info.name().to_owned();
                let packed_name = plain_name.replace("ffn_down", "ffn_down_t");
                Ok(PackedDown {
                    layer,
                    plain_name,
                    packed_name,
                    to,
                })
            })
            .collect()
    }
}

/// A packed model whose header is written.
#[derive(Debug)]
pub struct PackedOutput<'a> {
    packer: &'a Packer<'a>,
    stream: GgufStream,
    downs: Vec<PackedDown>,
}

impl PackedOutput<'_> {
    /// Writes the tensors and gives the file its name. Between tensors `stop` is asked whether to give up; the answer
    /// is whether the file was written.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn write(mut self, stop: &dyn Fn() -> bool) -> Result<bool, ModelError> {
        let Packer {
            file,
            hyper,
            tensors,
        } = self.packer;
        for tensor in file.tensors() {
            if stop() {
                return Ok(false);
            }
            let is_plain = |down: &&PackedDown| down.plain_name == tensor.name();
            match self.downs.iter().find(is_plain) {
                Some(down) => {
                    let FileDown::Plain(matrix) = &tensors.layers[down.layer].down else {
                        unreachable!("checked in new")
                    };
                    let mut outcome = Ok(());
                    Transposer::new(matrix, down.to).each_row(0..hyper.n_ff, |_, row| {
                        if outcome.is_ok() {
                            outcome = self.stream.write(&down.packed_name, row);
                        }
                    });
                    outcome?;
                }
                None => self
                    .stream
                    .write(tensor.name(), &file.tensor_data(tensor))?,
            }
            file.drop_tensor_pages(tensor);
        }
        self.stream.finish()?;
        Ok(true)
    }
}

/// One layer's down projection on its way.
#[derive(Debug)]
struct PackedDown {
    layer: usize,
    plain_name: String,
    packed_name: String,
    to: QuantType,
}
