from ._calibration import (
    Piece as Piece,  # Some sequences of a calibration batch: the graph's inputs, and the number of the batch
)
from ._calibration import (
    as_calls as as_calls,  # Positional and keyword arguments of every batch
)
from ._calibration import (
    check_calibration as check_calibration,  # The batches, if they are an iterable of batches
)
from ._calibration import (
    check_inputs as check_inputs,  # Refuse graph inputs that a program does not take, or that nothing can be seen of
)
from ._calibration import (
    in_pieces as in_pieces,  # Batches in pieces of one sequence, of one image, or of some rows of a table, where these do not see each other
)
from ._calibration import (
    read_batches as read_batches,  # The graph inputs of every batch
)
from ._calibration import (
    whole_batches as whole_batches,  # Batches as they came
)
from ._consumers import (
    Consumer as Consumer,  # One weight read as matrices, with all uses that read it so, and what is seen of it
)
from ._consumers import (
    Consumers as Consumers,  # All consumers of the groups that can be pruned
)
from ._consumers import (
    order_of as order_of,  # The order of one group
)
from ._consumers import (
    orders_of as orders_of,  # The order of each group, with its losses
)
from ._decision import (
    Decision as Decision,  # What was chosen
)
from ._decision import (
    decided as decided,  # The groups that lose anything, in graph order
)
from ._decision import (
    nothing as nothing,  # The decision to leave a program as it is
)
from ._decision import (
    places_of as places_of,  # Which channel sets go of each group that loses any, by their places among those of the group
)
from ._decision import (
    restricted as restricted,  # The decision for some of its groups alone
)
from ._drift import (
    Drift as Drift,  # The dense model beside the pruned one, on the same batches
)
from ._gradients import (
    ENOUGH as ENOUGH,  # tokens for each column of a consumer from which its Gram matrix says enough to predict losses
)
from ._gradients import (
    Observation as Observation,  # What is observed of the dense model
)
from ._journal import (
    Journal as Journal,  # A folder with one subfolder for each time that everything seen so far was decided
)
from ._journal import (
    Ledger as Ledger,  # Decisions, numbered as they are made, the same in all processes
)
from ._journal import (
    open_journal as open_journal,  # The journal of a calibration
)
from ._losses import (
    Loss as Loss,  # a loss maps what the model returned, and the arguments of the call by name, to its terms: one value for each prediction
)
from ._losses import (
    Outputs as Outputs,  # Random combinations of the outputs
)
from ._losses import (
    evaluated as evaluated,  # The terms of a loss; those of this module leave padding out, one of the user's sees to it by itself
)
from ._losses import (
    next_token as next_token,  # Cross-entropy of each token given those before it, shape [predictions]
)
from ._losses import (
    number_outputs as number_outputs,  # The outputs that have a squared error
)
from ._losses import (
    output_tensors as output_tensors,  # The tensors among outputs or arguments, however these are nested
)
from ._losses import (
    predictions as predictions,  # The logits [batch, tokens, vocabulary], the tokens [batch, tokens], and which of them count
)
from ._losses import (
    resolve_loss as resolve_loss,  # The function of a loss given by name
)
from ._losses import (
    token_mask as token_mask,  # Where a token counts, [batch, tokens], by the mask among the arguments of a call
)
from ._losses import (
    without_padding as without_padding,  # What counts of an output, and how many elements of it each row holds
)
from ._matrices import (
    ConsumerMatrices as ConsumerMatrices,  # One use of a weight, read as one matrix per block
)
from ._obs import (
    OBS as OBS,  # Removes what is cheapest once all that stays was repaired to make up for it
)
from ._obs import (
    Elimination as Elimination,  # One block of a consumer, whose columns are eliminated one set after another
)
from ._obs import (
    centred_of as centred_of,  # What repair has to make up for, XᵀX, without means where a bias gives them
)
from ._obs import (
    greedy as greedy,  # Take out the cheapest channel sets round by round, equally many of each block
)
from ._obs import (
    resolve_score as resolve_score,  # The score of groups that a name, or a score of columns, stands for
)
from ._products import (
    layouts_along as layouts_along,  # How the channels that a product sums over lie along one of its operands
)
from ._ranks import (
    Ranks as Ranks,  # The processes of a group; without one, this process alone
)
from ._ranks import (
    ended_together as ended_together,  # Have what a process raises end a function in all processes of its keyword group
)
from ._restoration import (
    Problem as Problem,  # One consumer (one block of a stacked or grouped one) whose columns M stay, as a restoration of your own is given it
)
from ._restoration import (
    Restoration as Restoration,  # A restoration of your own: the weight of the kept columns, shape [rows, kept]
)
from ._restoration import (
    Restore as Restore,  # What a consumer is restored by inside the library: weight, Gram matrices fitted and held out, kept columns
)
from ._restoration import (
    Restored as Restored,  # The outcome for one consumer
)
from ._restoration import (
    damped as damped,  # The solution of ridge for one strength, which nothing judges; shape [rows, columns], zero in the removed columns
)
from ._restoration import (
    restored_by as restored_by,  # What a restoration of the user's stands for; arguments of what is returned as for ridge
)
from ._restoration import (
    ridge as ridge,  # V = W (G + δI)[:, M] (G[M, M] + δI)⁻¹, which minimises ‖X(W − V)ᵀ‖²_F + δ‖V − W[:, M]‖²_F over weights V on the columns M
)
from ._restoration import (
    together as together,  # The outcome for a consumer of several blocks: weight [blocks, rows, columns], errors averaged over the blocks
)
from ._restoration import (
    without_values as without_values,  # An outcome whose weight has a shape alone: its values are elsewhere
)
from ._roles import (
    TokenRoles as TokenRoles,  # Roles of the tokens of every batch, as tensors that broadcast to an activation
)
from ._scoring import (
    ByColumns as ByColumns,  # The order by a score of single columns, the lowest first
)
from ._scoring import (
    Columns as Columns,  # One block of one consumer as a score sees it
)
from ._scoring import (
    GroupColumns as GroupColumns,  # One coupled group as a score sees it
)
from ._scoring import (
    GroupScore as GroupScore,  # A score of whole groups; derive from it what a function of single columns cannot say
)
from ._scoring import (
    Order as Order,  # In which order channel sets go
)
from ._scoring import (
    Random as Random,  # Uniform random scores, reproducible: a block of a consumer always gets the same by its name, whatever was scored before it
)
from ._scoring import (
    Score as Score,  # what score= takes that is no name
)
from ._scoring import (
    by_set as by_set,  # The values of all consumers' columns, added up for the channel sets that take them along, shape [sets]
)
from ._scoring import (
    by_value as by_value,  # The order in which the lowest go first
)
from ._scoring import (
    dense_numbers as dense_numbers,  # What code of the user's returned, if it is a tensor of real numbers of a shape
)
from ._scoring import (
    fasp as fasp,  # Σ_i |W_ij| · ‖X_j‖₂ (FASP, arXiv 2501.09412, the column form of Wanda's metric)
)
from ._scoring import (
    magnitude as magnitude,  # ‖W_j‖₂: the length of the column, without data
)
from ._statistics import (
    Gram as Gram,  # Accumulates G = XᵀX over tokens, on the device of the activations (FASP, section 3): a sum, so that it can be all-reduced
)
from ._statistics import (
    InputGradients as InputGradients,  # Accumulates HᵀH of the gradients of a loss with respect to a consumer's input
)
from ._statistics import (
    MakeStatistic as MakeStatistic,  # makes a statistic for one block of a consumer, from its number of columns and the device
)
from ._statistics import (
    SplitGram as SplitGram,  # Gram matrices of the tokens that a restoration is fitted on and of those held out to judge it
)
from ._statistics import (
    Statistic as Statistic,  # A sum over the tokens of one block of a consumer, so that batches add up
)
from ._statistics import (
    add_product as add_product,  # Add α LᵀR, which is symmetric, to the blocks of a matrix up to its diagonal: just over half of the work
)
from ._statistics import (
    diagonal_of as diagonal_of,  # The diagonal of a Gram matrix, of which X may be given
)
from ._statistics import (
    energy_of as energy_of,  # tr(R G Rᵀ) for the last columns of a Gram matrix, of which X may be given, as many as the rows have, in its precision
)
from ._statistics import (
    is_few as is_few,  # Whether a Gram matrix is given by X with XᵀX = G, which has fewer rows than columns
)
from ._statistics import (
    joined as joined,  # The sum of two Gram matrices, of which X may be given
)
from ._statistics import (
    precise as precise,  # The most precise dtype for solves on a device
)
from ._statistics import (
    whole as whole,  # The Gram matrix, of which X may be given
)
from ._trial import (
    BudgetTrial as BudgetTrial,  # Tries allocations of a budget, which may have fewer groups than the model, or groups that stand for others
)
from ._trial import (
    Candidates as Candidates,  # Runs a model as it would be pruned
)
from ._trial import (
    ModelTrial as ModelTrial,  # Runs the dense model with the weights of consumers as an allocation would leave them
)
from ._visit import (
    Choices as Choices,  # for each group that loses anything, by name, what says which of its channel sets go
)
from ._visit import (
    Visit as Visit,  # How the consumers of a program are visited
)
from ._visit import (
    without_data as without_data,  # What goes where nothing is observed
)

__all__ = [
    "Columns",
    "Gram",
    "GroupColumns",
    "GroupScore",
    "InputGradients",
    "Loss",
    "Order",
    "Problem",
    "Restoration",
    "Score",
    "Statistic",
    "by_set",
    "by_value",
    "damped",
    "fasp",
    "magnitude",
    "next_token",
    "ridge",
]
